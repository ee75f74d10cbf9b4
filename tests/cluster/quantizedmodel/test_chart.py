"""The chart: what it renders, and its life in a real API server. Its rights are shown in `test_rights.py`."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from localcluster.lifecycle import Cluster
from manthanquant_operator import settings
from support.operator_process import CHART, helm, render
from support.quantizedmodels import eventually

pytestmark = pytest.mark.cluster
CRD = "quantizedmodels.manthanquant.io"
VARIANTS: dict[str, tuple[str, ...]] = {
    "defaults": (),
    "namespaced": ("watchNamespaces={a,b}",),
    "everything": (
        "podMonitor.enabled=true", "dashboard.enabled=true", "operator.replicas=2", "operator.priorityClassName=high",
        "operator.nodeSelector.pool=system", "images.pullSecrets={registry}", "imagePullSecrets={registry}",
        "allowedHostPaths={/srv/models}", "serviceAccount.annotations.a=b", "operator.podAnnotations.a=b",
    ),
    "least": ("crds.enabled=false", "rbac.aggregate=false", "serviceAccount.create=false", "serviceAccount.name=mine"),
}  # fmt: skip


def _of(kind: str, objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [obj for obj in objects if obj["kind"] == kind]


@pytest.fixture(params=VARIANTS)
def rendered(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return render(*VARIANTS[request.param])


def test_the_api_server_accepts_every_object(rendered: list[dict[str, Any]], control_plane: Cluster) -> None:
    """A PodMonitor's kind is not installed here, so it is left out."""
    known = [obj for obj in rendered if obj["kind"] != "PodMonitor"]
    for obj in known:
        obj["metadata"].pop("namespace", None)
    control_plane.kubectl("apply", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump_all(known))


def test_every_object_has_the_charts_labels_and_namespace(rendered: list[dict[str, Any]]) -> None:
    cluster_scoped = {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"}
    for obj in rendered:
        assert obj["metadata"]["labels"]["app.kubernetes.io/instance"] == "manthanquant", obj["kind"]
        assert ("namespace" in obj["metadata"]) != (obj["kind"] in cluster_scoped), obj["kind"]


def test_the_operators_pod_is_restricted(rendered: list[dict[str, Any]]) -> None:
    (deployment,) = _of("Deployment", rendered)
    pod = deployment["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["enableServiceLinks"] is False
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_operator_reads_the_settings_that_the_chart_writes(rendered: list[dict[str, Any]], tmp_path: Any) -> None:
    (config,) = [c for c in _of("ConfigMap", rendered) if "settings.yaml" in c["data"]]
    path = tmp_path / "settings.yaml"
    path.write_text(config["data"]["settings.yaml"])
    loaded = settings.load(path)
    assert loaded.leader_election.namespace == loaded.operator_namespace == "manthanquant-system"
    assert loaded.images.cpu == "ghcr.io/manthanquant/server-cpu:0.1.0"


def test_the_rights_in_named_namespaces_are_those_everywhere() -> None:
    (role,) = [o for o in _of("ClusterRole", render()) if o["metadata"]["name"] == "manthanquant"]
    namespaced = [o for o in _of("Role", render("watchNamespaces={a,b}")) if o["metadata"]["name"] == "manthanquant"]
    assert [o["metadata"]["namespace"] for o in namespaced] == ["a", "b"]
    *rules, nodes = role["rules"]
    assert nodes == {"apiGroups": [""], "resources": ["nodes"], "verbs": ["list"]}  # no namespace has them
    assert all(o["rules"] == rules for o in namespaced)


def test_a_namespaced_operator_has_no_rights_on_the_cluster() -> None:
    objects = render("watchNamespaces={a}", "rbac.aggregate=false")
    assert not _of("ClusterRole", objects) and not _of("ClusterRoleBinding", objects)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("crds.enable=true", "additional properties 'enable' not allowed"),
        ("operator.replicas=two", "got string, want integer"),
        ("operator.image.pullPolicy=Sometimes", "pullPolicy"),
        ("allowedHostPaths={models}", "does not match pattern"),
        ("watchNamespaces={A}", "does not match pattern"),
        ("telemetry.intervalSeconds=0", "minimum: got 0, want 1"),
        ("podMonitor.interval=often", "does not match pattern"),
        ("serviceAccount.create=false", "serviceAccount.name is needed"),
    ],
)
def test_bad_values_are_refused(value: str, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        render(value)


def test_lint_has_nothing_to_say() -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", str(CHART), "--kube-version", "v1.37.2")


def test_install_upgrade_uninstall(own_plane: Cluster) -> None:
    where = ("--namespace", "sys")

    def get(*what: str) -> Any:
        text = own_plane.kubectl("get", *what, "--ignore-not-found", "-o", "json")
        return json.loads(text) if text else None

    helm("install", "mq", str(CHART), "--create-namespace", *where, cluster=own_plane)
    own_plane.kubectl("wait", "--for=condition=Established", f"crd/{CRD}")
    notes = helm("get", "notes", "mq", *where, cluster=own_plane)
    assert "in every namespace" in notes and "kubectl get qm -o wide" in notes
    manifest = {
        "apiVersion": "manthanquant.io/v1alpha1",
        "kind": "QuantizedModel",
        "metadata": {"name": "m", "namespace": "default"},
        "spec": {"model": {"uri": "hf://a/b"}},
    }
    own_plane.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(manifest))

    def can(user: str, verb: str, *resource: str) -> bool:
        command = ("auth", "can-i", verb, *resource, "--as", user, "-n", "default")
        try:
            return own_plane.kubectl(*command).strip() == "yes"
        except RuntimeError:  # kubectl's exit status says no
            return False

    own_plane.kubectl("create", "rolebinding", "v", "--clusterrole=view", "--user=viewer", "-n", "default")
    own_plane.kubectl("create", "rolebinding", "e", "--clusterrole=edit", "--user=editor", "-n", "default")
    eventually(lambda: can("viewer", "list", CRD) and can("editor", "create", CRD))
    assert not can("viewer", "create", CRD) and not can("editor", "patch", CRD, "--subresource=status")

    before = get("deployment", "mq-manthanquant", "-n", "sys")
    helm("upgrade", "mq", str(CHART), *where, "--set", "telemetry.intervalSeconds=5", cluster=own_plane)
    after = get("deployment", "mq-manthanquant", "-n", "sys")
    checksums = [o["spec"]["template"]["metadata"]["annotations"]["checksum/settings"] for o in (before, after)]
    assert checksums[0] != checksums[1]  # new settings restart the operator
    assert get("qm", "m", "-n", "default")["metadata"]["generation"] == 1

    helm("uninstall", "mq", *where, cluster=own_plane)
    kinds = "deployment,configmap,serviceaccount,role,rolebinding,clusterrole,clusterrolebinding"
    assert own_plane.kubectl("get", kinds, "-n", "sys", "-l", "app.kubernetes.io/instance=mq", "-o", "name") == ""
    assert get("qm", "m", "-n", "default") is not None  # crds.keep
    helm("install", "mq", str(CHART), *where, "--set", "crds.keep=false", cluster=own_plane)
    helm("uninstall", "mq", *where, cluster=own_plane)
    eventually(lambda: get("crd", CRD) is None)
