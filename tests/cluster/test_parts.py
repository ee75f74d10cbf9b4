"""The local cluster's parts that need neither root nor a running cluster."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from localcluster import binaries, cgroups, config, images, lifecycle, paths, provisioner

# -- binaries ----------------------------------------------------------------------------------------------------


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A folder with a program and its stamp for key `key`."""
    (tmp_path / "pause").write_bytes(b"program")
    (tmp_path / "pause.sha256").write_text(binaries._stamp("key", tmp_path / "pause"))
    return tmp_path


def test_a_whole_program_of_the_same_key_is_current(built: Path) -> None:
    assert binaries.is_current(built, binaries.PAUSE, "key")


def test_a_program_of_another_key_is_not_current(built: Path) -> None:
    assert not binaries.is_current(built, binaries.PAUSE, "other")


@pytest.mark.parametrize("damage", [b"Program", b"progra", b""])
def test_a_damaged_program_is_not_current(built: Path, damage: bytes) -> None:
    (built / "pause").write_bytes(damage)
    assert not binaries.is_current(built, binaries.PAUSE, "key")


def test_the_key_follows_version_and_flags() -> None:
    keys = {program.key(version) for program in (binaries.HELM, binaries.KUBECONFORM) for version in ("a", "b")}
    assert len(keys) == 4


BUILD = "from localcluster import binaries; binaries.ensure((binaries.PAUSE,))"


@pytest.mark.skipif(not shutil.which("go"), reason="needs Go")
def test_two_builders_build_once(tmp_path: Path) -> None:
    cache = subprocess.run(["go", "env", "GOCACHE"], capture_output=True, text=True, check=True).stdout.strip()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(Path.home()),
        "GOCACHE": cache,
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": str(paths.SOURCE_DIR.parent),
    }
    both = [
        subprocess.Popen([sys.executable, "-c", BUILD], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(text.count("MB in") for text in printed) == [0, 1]
    checksum = ["sha256sum", "--check", "--quiet", "pause.sha256"]
    subprocess.run(checksum, cwd=tmp_path / "manthanquant" / "bin", check=True)


# -- configuration -----------------------------------------------------------------------------------------------


def test_a_control_plane_has_no_node_processes() -> None:
    names = {component.name for component in config.components(config.Instance("a", 1, nodes=False), "python3")}
    assert names == {"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "provisioner"}


def test_an_instance_survives_its_file() -> None:
    instance = config.Instance("a-1", 16443, nodes=False, shared_images=True)
    assert config.Instance.from_json(instance.to_json()) == instance


def test_files_that_should_be_json_are() -> None:
    for name, text in config.files().items():
        if name.endswith((".json", ".conflist")):
            json.loads(text)


# -- provisioner -------------------------------------------------------------------------------------------------


def claim(phase: str = "Pending", **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "c", "namespace": "n", "uid": "u"},
        "spec": {
            "storageClassName": config.STORAGE_CLASS,
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": "1Gi"}},
            **spec,
        },
        "status": {"phase": phase},
    }


@pytest.mark.parametrize(
    ("given", "volumes", "waiting"),
    [
        (claim(), {}, True),
        (claim(), {"pvc-u": {}}, False),
        (claim("Bound"), {}, False),
        (claim(storageClassName="other"), {}, False),
        (claim(volumeName="chosen"), {}, False),
    ],
)
def test_which_claims_wait_for_a_volume(given: dict[str, Any], volumes: dict[str, Any], waiting: bool) -> None:
    assert provisioner.is_waiting(given, volumes) is waiting


def test_a_volume_is_bound_to_its_claim() -> None:
    spec = provisioner.volume_for(claim())["spec"]
    assert spec["claimRef"]["uid"] == "u"
    assert spec["hostPath"]["path"] == f"{config.NODE_DIR}/volumes/pvc-u"
    assert spec["capacity"] == {"storage": "1Gi"}


# -- images, sockets, control groups -----------------------------------------------------------------------------


def test_the_same_program_makes_the_same_image(tmp_path: Path) -> None:
    program = tmp_path / "pause"
    program.write_bytes(b"program")
    for name in ("a.tar", "b.tar"):
        images.write_single_file_image(tmp_path / name, "localhost/pause:1", program)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as archive:
        manifest = json.load(archive.extractfile("manifest.json") or pytest.fail("no manifest"))
        assert manifest[0]["RepoTags"] == ["localhost/pause:1"]
        assert set(archive.getnames()) == {"manifest.json", "layer.tar", manifest[0]["Config"]}


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(lifecycle.ClusterError, match=rf"port {port}: .*--port"):
            lifecycle._listen(port)


def test_hierarchies_of_v1(tmp_path: Path) -> None:
    for name in ("cpu,cpuacct", "memory", "unified"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").touch()
    (tmp_path / "unified" / "cgroup.controllers").touch()
    (tmp_path / "cpu").symlink_to("cpu,cpuacct")
    assert [path.name for path in cgroups.hierarchies(tmp_path)] == ["cpu,cpuacct", "memory"]


def test_hierarchies_of_v2(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").touch()
    (tmp_path / "system.slice").mkdir()
    assert cgroups.hierarchies(tmp_path) == [tmp_path]


V2_ROUND = """
import os, subprocess, sys
from pathlib import Path
from localcluster import cgroups

subprocess.run(["mount", "-t", "cgroup2", "cgroup2", str(cgroups.ROOT)], check=True)  # over whatever the host has there
name = sys.argv[1]
offered = set((cgroups.ROOT / "cgroup.controllers").read_text().split())
enabled = (cgroups.ROOT / "cgroup.subtree_control").read_text()
added = cgroups.create(name)
child = os.fork()
if not child:
    cgroups.enter(name)
    assert Path("/proc/self/cgroup").read_text().splitlines()[-1] == "0::/node", "the group is the root that is seen"
    cgroups.remount()
    assert (cgroups.ROOT / "node" / "cgroup.procs").read_text().split()[0] == str(os.getpid())
    given = set((cgroups.ROOT / "cgroup.subtree_control").read_text().split())
    assert given == offered & set(cgroups.CONTROLLERS), "the kubelet may use every controller that there is"
    (cgroups.ROOT / "kubepods").mkdir()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
subprocess.run(["umount", str(cgroups.ROOT)], check=True)  # the child's, which starts at the group
subprocess.run(["mount", "-t", "cgroup2", "cgroup2", str(cgroups.ROOT)], check=True)
assert cgroups.processes(name) == []
cgroups.remove(name, added)
assert not (cgroups.ROOT / name).exists()
assert (cgroups.ROOT / "cgroup.subtree_control").read_text() == enabled
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or "cgroup2" not in Path("/proc/filesystems").read_text(), reason="needs root and cgroup v2"
)
def test_a_group_on_v2() -> None:
    """In a mount namespace of its own, so it is tried where the host uses v1, with the controllers that v1 leaves."""
    isolated = ["unshare", "--mount", "--propagation", "private"]
    command = [*isolated, sys.executable, "-c", V2_ROUND, f"localcluster-parts-{os.getpid()}"]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(paths.SOURCE_DIR.parent)}
    subprocess.run(command, env=environment, check=True)
