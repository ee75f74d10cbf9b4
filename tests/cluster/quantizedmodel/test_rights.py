"""The chart's rights are the least: a model's whole life uses every one of them, and asks for nothing beyond.

What was used is what the API server's audit log says, not what the code seems to ask for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from manthanquant_operator.children import KINDS
from support.operator_process import OperatorProcess, render
from support.quantizedmodels import Models, PlayedKubelet, eventually

pytestmark = pytest.mark.cluster
Right = tuple[str, str, str]  # API group, resource with its subresource, verb
PRUNED = {kind.name for kind in KINDS.values() if kind.prune}
EVERY_CHILD: dict[str, Any] = {
    "model": {"uri": "hf://a/b", "cache": {"size": "1Mi", "accessMode": "ReadWriteMany"}},
    "resources": {"accelerator": "cpu"},
    "autoscaling": {"maxReplicas": 2, "target": 80},
    "networkPolicy": {"enabled": True},
}


def _granted(objects: Sequence[dict[str, Any]]) -> set[Right]:
    """What the operator's own roles allow. The roles for people are bound to nobody by the chart."""
    bound = {(o["roleRef"]["kind"], o["roleRef"]["name"]) for o in objects if o["kind"].endswith("RoleBinding")}
    return {
        (group, resource, verb)
        for role in objects
        if (role["kind"], role["metadata"]["name"]) in bound
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def _needed(requests: Iterable[dict[str, Any]]) -> set[Right]:
    """The rights that these requests need.

    An apply is a patch; where it makes the object (201), the API server asks for `create` too.
    """
    needed = set()
    for request in requests:
        target = request.get("objectRef")  # absent: the API's own description, which everybody may read
        if target is None:
            continue
        resource = "/".join(target[key] for key in ("resource", "subresource") if key in target)
        verbs = {request["verb"]}
        if request["verb"] == "patch" and request["responseStatus"]["code"] == 201:
            verbs.add("create")
        needed |= {(target.get("apiGroup", ""), resource, verb) for verb in verbs}
    return needed


def _allowed(requests: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in requests if r["annotations"]["authorization.k8s.io/decision"] == "allow"]


def test_a_models_life_uses_every_right_and_no_other(
    models: Models, kubelet: PlayedKubelet, operator: OperatorProcess
) -> None:
    models.create("m", EVERY_CHILD)
    (pod,) = models.pods("m")
    with kubelet.mount_failure(pod, "no such directory"):  # which only the pod's events tell
        models.wait("m", "Ready", status="False", reason="FailedMount")
        kubelet.ready(pod)
        models.wait("m", "Ready", status="True")
    gpu = {"accelerator": "nvidia.com/gpu"}  # a plan for it looks for the nodes' memory
    models.patch("m", {"spec": {"planOnly": True, "autoscaling": None, "networkPolicy": None, "resources": gpu}})
    eventually(lambda: models.children("m").keys() & PRUNED == {"Job"}, what=lambda: models.children("m"))
    models.patch("m", {"spec": {"planOnly": False}})
    serving = {"Deployment", "PodDisruptionBudget", "Service"}
    eventually(lambda: models.children("m").keys() & PRUNED == serving, what=lambda: models.children("m"))

    granted = _granted(render(*operator.values))

    def unused() -> set[Right]:
        return granted - _needed(_allowed(operator.requests()))

    eventually(lambda: not unused(), what=unused)
    assert _needed(operator.requests()) - granted == set()  # an API server that just started may deny what is granted
