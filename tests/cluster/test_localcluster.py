"""The local cluster itself: what it offers to other tests, and that a stop leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from localcluster import cgroups, config, lifecycle, paths
from localcluster.api import ApiError
from localcluster.lifecycle import Cluster

pytestmark = pytest.mark.cluster


def eventually(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """The first true value of `condition`; fails when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "condition did not come true in time"
        time.sleep(0.1)
    return value


CLAIM = {
    "apiVersion": "v1",
    "kind": "PersistentVolumeClaim",
    "metadata": {"name": "claim"},
    "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}},
}


# -- control plane -----------------------------------------------------------------------------------------------


@pytest.fixture
def namespace(control_plane: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.node.name.replace("_", "-").lower()
    control_plane.kubectl("create", "namespace", name)
    yield name
    control_plane.kubectl("delete", "namespace", name, "--wait=false")


def test_versions_agree(control_plane: Cluster) -> None:
    version = json.loads(control_plane.kubectl("version", "--output=json"))
    assert version["clientVersion"]["gitVersion"] == config.KUBERNETES_VERSION
    assert version["serverVersion"]["gitVersion"] == config.KUBERNETES_VERSION


def test_a_deployment_makes_pods_and_garbage_is_collected(control_plane: Cluster, namespace: str) -> None:
    control_plane.kubectl("-n", namespace, "create", "deployment", "web", "--image=absent", "--replicas=2")

    def pods() -> list[str]:
        return control_plane.kubectl("-n", namespace, "get", "pods", "--output=name").split()

    assert len(eventually(lambda: len(pods()) == 2 and pods())) == 2
    control_plane.kubectl("-n", namespace, "delete", "deployment", "web")
    eventually(lambda: not pods())


def test_a_claim_is_bound_and_its_volume_goes_with_it(control_plane: Cluster, namespace: str) -> None:
    api = control_plane.api
    collection = f"/api/v1/namespaces/{namespace}/persistentvolumeclaims"
    api.create(collection, CLAIM)
    claim = eventually(lambda: (c := api.get(f"{collection}/claim"))["status"]["phase"] == "Bound" and c)
    volume = f"/api/v1/persistentvolumes/{claim['spec']['volumeName']}"
    folder = control_plane.folder / "volumes" / claim["spec"]["volumeName"]
    assert folder.is_dir()
    api.delete(f"{collection}/claim")

    def gone() -> bool:
        try:
            api.get(volume)
        except ApiError as error:
            return error.status == 404
        return False

    eventually(gone)
    assert not folder.exists()


def test_the_audit_log_names_the_writer(control_plane: Cluster, namespace: str) -> None:
    control_plane.kubectl("-n", namespace, "create", "configmap", "audited")

    def written() -> list[Any]:
        events = [json.loads(line) for line in control_plane.audit_log.read_text().splitlines()]
        return [e for e in events if e.get("objectRef", {}).get("name") == "audited" and e["verb"] == "create"]

    assert eventually(written)[0]["user"]["username"] == config.ADMIN.user


def test_a_running_cluster_is_returned_as_it_is(control_plane: Cluster) -> None:
    again = lifecycle.up(control_plane.instance.name, nodes=control_plane.instance.nodes)
    assert again == control_plane


def test_a_component_that_ends_is_started_again(control_plane: Cluster) -> None:
    def schedulers() -> list[int]:
        return cgroups.running(control_plane.instance.cgroup, f"{config.NODE_BIN}/kube-scheduler")

    (first,) = schedulers()
    os.kill(first, 9)
    assert eventually(lambda: any(pid != first for pid in schedulers()))


@pytest.mark.parametrize("name", ["", "-a", "A", "a_b", "a" * 33, "../a"])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        config.Instance(name, 1)


# -- a whole cluster ---------------------------------------------------------------------------------------------


def _sysctls() -> dict[str, str]:
    """Every readable setting; counters and random values, which change by themselves, are left out."""
    changing = ("fs/quota", "fs/dentry-state", "fs/inode", "fs/file-nr", "fs/aio-nr", "kernel/random", "kernel/ns_last")
    values = {}
    for path in Path("/proc/sys").rglob("*"):
        name = str(path.relative_to("/proc/sys"))
        if path.is_file() and not name.startswith((*changing, "kernel/pty", "net/netfilter/nf_conntrack_count")):
            try:
                values[name] = path.read_text(errors="replace")
            except OSError:
                continue
    return values


def _host_state() -> dict[str, Any]:
    """What a stopped cluster must leave as it was. Image builds of others may mount their own storage meanwhile."""
    mounts = [line.split(" ", 3)[3] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    rules = subprocess.run(["iptables-save"], capture_output=True, text=True, check=True).stdout
    found = (path for group in cgroups.hierarchies() for path in group.glob("localcluster-snapshot*"))
    return {
        "mounts": sorted(line for line in mounts if "/containers/storage" not in line),
        "interfaces": sorted(os.listdir("/sys/class/net")),
        "routes": Path("/proc/net/route").read_text(),
        "iptables": [line for line in rules.splitlines() if not line.startswith(("#", ":"))],
        "cgroups": sorted(map(str, found)),
        "sysctls": _sysctls(),
        "folders": sorted(str(p) for p in Path("/var/lib").iterdir()),
        "kubernetes": [p for p in ("/etc/kubernetes", "/etc/cni", "/usr/libexec/kubernetes") if Path(p).exists()],
    }


POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "pod"},
    "spec": {
        "terminationGracePeriodSeconds": 0,
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "claim"}}],
        "containers": [
            {
                "name": "pause",
                "image": config.PAUSE_IMAGE,
                "imagePullPolicy": "Never",
                "volumeMounts": [{"name": "data", "mountPath": "/data"}],
                "resources": {"limits": {"memory": "32Mi", "cpu": "100m"}},
            }
        ],
    },
}


@pytest.mark.skipif(os.geteuid() != 0, reason="the local cluster needs root")
def test_a_stop_with_running_pods_leaves_nothing_behind() -> None:
    name = f"snapshot-{os.getpid()}"
    before = _host_state()
    try:
        cluster = lifecycle.up(name, port=0)
        api = cluster.api
        api.create("/api/v1/namespaces/default/persistentvolumeclaims", CLAIM)
        api.create("/api/v1/namespaces/default/pods", POD)
        cluster.kubectl("wait", "--for=condition=Ready", "pod/pod", "--timeout=60s")
        resolved = cluster.run_in_node("ip", "-o", "link", "show", "cni0")
        assert "cni0" in resolved
        processes = cgroups.processes(cluster.instance.cgroup)
        assert len(processes) > len(config.components(cluster.instance, "python3"))  # pods' processes are in it too
        assert any("localcluster" in path for path in _host_state()["cgroups"])
    finally:
        lifecycle.down(name)
    assert [pid for pid in processes if _is_in_cluster(pid)] == []
    assert not paths.instance_dir(name).exists()
    after = _host_state()
    for what in before:
        assert after[what] == before[what], what


def _is_in_cluster(pid: int) -> bool:
    """Whether a process with this id still belongs to a cluster of these tests; ids are used again."""
    try:
        return "localcluster-snapshot" in Path(f"/proc/{pid}/cgroup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
