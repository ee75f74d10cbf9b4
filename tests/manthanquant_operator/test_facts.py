"""What is kept of objects, and how a change of what we own is seen."""

from __future__ import annotations

import copy
from typing import Any

from manthanquant_operator import facts
from manthanquant_operator.facts import DeploymentFacts, Termination

LABELS = {"manthanquant.io/model": "qwen", "app.kubernetes.io/component": "server"}
POD: dict[str, Any] = {
    "metadata": {
        "name": "qwen-1", "namespace": "ml", "uid": "u", "labels": LABELS, "creationTimestamp": "2026-01-01T00:00:00Z",
    },
    "spec": {"nodeName": "node1"},
    "status": {
        "phase": "Pending",
        "podIP": "10.0.0.7",
        "conditions": [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "False"}],
        "initContainerStatuses": [
            {
                "name": "prepare", "image": "i:1", "ready": False, "restartCount": 2,
                "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}},
                "lastState": {"terminated": {"reason": "Error", "exitCode": 3, "message": " words\n"}},
            }
        ],
    },
}  # fmt: skip


def _child(**metadata: Any) -> dict[str, Any]:
    return {"metadata": {"name": "qwen", "namespace": "ml", "uid": "u", "labels": LABELS, "generation": 2, **metadata}}


def test_the_key_is_namespace_and_label() -> None:
    assert facts.key_of(POD) == ("ml", "qwen")
    assert facts.key_of({"metadata": {"name": "x", "namespace": "ml"}}) is None


def test_a_pods_facts() -> None:
    pod = facts.pod(POD)
    assert (pod.name, pod.node, pod.ip, pod.phase, pod.ready, pod.terminating) == (
        "qwen-1", "node1", "10.0.0.7", "Pending", False, False,
    )  # fmt: skip
    container = pod.container("prepare")
    assert container and container.restarts == 2 and container.waiting_reason == "CrashLoopBackOff"
    assert container.latest_end == Termination("Error", 3, "words")
    assert pod.container("server") is None


def test_only_a_failed_scheduling_has_a_message() -> None:
    pod = copy.deepcopy(POD)
    pod["status"]["conditions"][0] = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes"}
    assert facts.pod(pod).unschedulable == "0/3 nodes"
    assert facts.pod(POD).unschedulable == ""


def test_a_pod_without_a_status_is_new() -> None:
    pod = facts.pod({"metadata": {"name": "p", "namespace": "ml", "uid": "u"}})
    assert (pod.phase, pod.ip, pod.ready, pod.init, pod.containers) == ("", "", False, (), ())


def test_a_deployments_facts() -> None:
    body = _child() | {
        "status": {
            "observedGeneration": 1, "replicas": 3, "updatedReplicas": 2, "readyReplicas": 1,
            "conditions": [{"type": "ReplicaFailure", "status": "True", "message": "exceeded quota"}],
        }
    }  # fmt: skip
    assert facts.child("Deployment", body).deployment == DeploymentFacts(False, 3, 2, 1, "exceeded quota")
    assert facts.child("Service", body).deployment is None


def test_a_claim_is_pending_until_it_is_bound() -> None:
    assert facts.child("PersistentVolumeClaim", _child() | {"status": {"phase": "Pending"}}).pending
    assert not facts.child("PersistentVolumeClaim", _child() | {"status": {"phase": "Bound"}}).pending
    assert not facts.child("Deployment", _child() | {"status": {"phase": "Pending"}}).pending


def test_the_owner_is_the_controller() -> None:
    owners = [{"uid": "a"}, {"uid": "b", "controller": True}]
    assert facts.owner_uid(_child(ownerReferences=owners)) == "b"
    assert facts.owner_uid(_child()) == ""


def _managed(*entries: tuple[str, str, str, dict[str, Any]]) -> dict[str, Any]:
    return _child(
        managedFields=[
            {"manager": manager, "operation": operation, "subresource": subresource, "fieldsV1": fields}
            for manager, operation, subresource, fields in entries
        ]
    )


def test_owned_fields_change_only_when_ours_do() -> None:
    ours = ("manthanquant-operator", "Apply", "", {"f:spec": {"f:replicas": {}}})
    other = ("kubectl", "Update", "", {"f:spec": {"f:paused": {}}})
    status = ("manthanquant-operator", "Apply", "status", {"f:status": {}})
    mine = facts.owned_fields(_managed(ours))
    assert mine == facts.owned_fields(_managed(other, status, ours))
    assert mine != facts.owned_fields(_managed(("manthanquant-operator", "Apply", "", {"f:spec": {}})))
    assert facts.owned_fields(_managed(other)) == ""
