"""Start, inspect and stop a cluster. Needs root, for namespaces, mounts and control groups."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from localcluster import binaries, cgroups, config, images, packages, paths, pki
from localcluster.api import Api, ApiError
from localcluster.config import Instance

Report = Callable[[str], None]
START_TIMEOUT = 180.0
PREFERRED_PORT = 16443


class ClusterError(RuntimeError):
    """The cluster could not be started, or is not what the caller asked for; the text says what to do."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A cluster's handle. It is valid while the cluster runs."""

    instance: Instance

    @property
    def folder(self) -> Path:
        return paths.instance_dir(self.instance.name)

    @property
    def kubeconfig(self) -> Path:
        """A kubeconfig for cluster-admin, for use on this machine."""
        return self.folder / "kubeconfig"

    @property
    def audit_log(self) -> Path:
        """The API server's log of requests, one JSON object a line: `user.username`, `verb`, `objectRef`, ..."""
        return self.folder / config.AUDIT_LOG

    @property
    def api(self) -> Api:
        return Api(self.kubeconfig)

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Run kubectl and return what it prints. Raises `ClusterError` with its message."""
        command = [str(paths.bin_dir() / "kubectl"), "--kubeconfig", str(self.kubeconfig), *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True)
        if done.returncode:
            raise ClusterError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def run_in_node(self, *command: str, stdin: IO[bytes] | None = None) -> str:
        """Run a program of the host inside the node's namespaces; paths are those that the node sees."""
        enter = ["nsenter", "--target", str(self._init_pid()), "--mount", "--pid", "--net", "--uts", "--ipc", "--"]
        environment = {"PATH": packages.SYSTEM_PATH}
        source = stdin or subprocess.DEVNULL
        done = subprocess.run([*enter, *command], stdin=source, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise ClusterError(f"{' '.join(command)} in the node: {done.stderr.strip()}")
        return done.stdout

    def in_network(self, *command: str) -> list[str]:
        """The command line that runs a program of the host with the cluster's network, and all else of the host."""
        return ["nsenter", "--target", str(self._init_pid()), "--net", "--", *command]

    def import_image(self, archive: Path) -> None:
        """Load a docker-archive or OCI archive into the node's image store."""
        self.run_in_node("ctr", "--namespace", "k8s.io", "images", "import", str(archive.resolve()))

    def is_running(self) -> bool:
        return _launcher_pid(self.folder) is not None

    def _init_pid(self) -> int:
        launcher = _launcher_pid(self.folder)
        if launcher is None:
            raise ClusterError(f"cluster {self.instance.name!r} is not running")
        (child,) = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        return int(child)


# -- the launcher's process: `unshare`, the parent of the node's pid 1 -------------------------------------------


def _process_identity(pid: int) -> str | None:
    """The process's start time in clock ticks since boot: with the pid it names one process. None: no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, start_time = fields[0], fields[19]
    return None if state == "Z" else start_time


def _launcher_pid(folder: Path) -> int | None:
    try:
        record = json.loads((folder / "launcher.json").read_text())
    except FileNotFoundError:
        return None
    return record["pid"] if _process_identity(record["pid"]) == record["identity"] else None


# -- start -------------------------------------------------------------------------------------------------------


def up(
    name: str, port: int | None = None, nodes: bool = True, keep_images: bool = False, report: Report = print
) -> Cluster:
    """Start the cluster and wait until it is ready. One that runs already is returned as it is.

    `port` is the API server's on 127.0.0.1; None takes 16443 or, where that is taken, any free one. `nodes=False`
    starts a control plane without a node: no kubelet and no containers. `keep_images` uses the image store that
    outlives clusters, unless another cluster is using it.
    """
    if os.geteuid():
        raise ClusterError("the local cluster needs root: namespaces, mounts and control groups")
    folder = paths.instance_dir(name)
    with binaries.locked(folder.with_name(f".{name}.lock")):
        running = find(name)
        if running:
            if running.instance.nodes < nodes:
                raise ClusterError(f"cluster {name!r} runs without a node; stop it first: down --name {name}")
            report(f"cluster {name!r} is running at {running.instance.host_url}")
            return running
        installed = packages.install(packages.CLUSTER if nodes else packages.CONTROL_PLANE)
        if installed:
            report(f"installed {' '.join(installed)}")
        binaries.ensure(binaries.CLUSTER if nodes else binaries.CONTROL_PLANE, report)
        _clean(name)
        started = time.monotonic()
        cluster = _start(name, port, nodes, keep_images)
        try:
            _wait_until_ready(cluster, started, report)
        except BaseException:
            _kill(cluster)
            cgroups.remove(cluster.instance.cgroup, _added_controllers(folder))
            raise
        return cluster


def _start(name: str, port: int | None, nodes: bool, keep_images: bool) -> Cluster:
    listener = _listen(port)
    store = _lock_image_store() if keep_images else None
    instance = Instance(name, listener.getsockname()[1], nodes, shared_images=store is not None)
    cluster = Cluster(instance)
    config.write_files(cluster.folder)
    pki.create(instance, cluster.folder)
    (cluster.folder / "instance.json").write_text(instance.to_json())
    added = cgroups.create(instance.cgroup)
    (cluster.folder / "controllers.json").write_text(json.dumps(added))
    with (cluster.folder / "node.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "localcluster.launch", name, str(listener.fileno())],
            env={**os.environ, "PYTHONPATH": str(paths.SOURCE_DIR.parent)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            pass_fds=[listener.fileno(), *([store.fileno()] if store else [])],
            start_new_session=True,
        )
    record = {"pid": process.pid, "identity": _process_identity(process.pid)}
    (cluster.folder / "launcher.json").write_text(json.dumps(record))
    # The node holds copies of its own.
    listener.close()
    if store:
        store.close()
    return cluster


def _lock_image_store() -> IO[str] | None:
    """An open file that holds the image store's lock; None where another cluster holds it."""
    paths.image_store().mkdir(parents=True, exist_ok=True)
    handle = paths.image_store().with_suffix(".lock").open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    return handle


def _listen(port: int | None) -> socket.socket:
    """A listening socket on 127.0.0.1. Made here, it belongs to the host's network wherever it is served."""
    for candidate in (PREFERRED_PORT, 0) if port is None else (port,):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", candidate))
            listener.listen(128)
            return listener
        except OSError as error:
            listener.close()
            taken = error
    raise ClusterError(f"port {port}: {taken.strerror}; choose another with --port")


def _wait_until_ready(cluster: Cluster, started: float, report: Report) -> None:
    def step(text: str) -> None:
        report(f"{text} after {time.monotonic() - started:.1f} s")

    api = cluster.api
    _wait(cluster, api.ready)
    step("API server ready")
    for collection, body in config.bootstrap_objects():
        api.create(collection, body)
    if cluster.instance.nodes:
        archive = cluster.folder / "pause.tar"
        images.write_single_file_image(archive, config.PAUSE_IMAGE, paths.bin_dir() / "pause")
        _wait(cluster, lambda: _node_has_containerd(cluster))
        cluster.import_image(archive)
        _wait(cluster, lambda: _node_is_ready(api))
        step("node ready")
    # The API server refuses pods until their namespace's ServiceAccount exists.
    _wait(cluster, lambda: _exists(api, "/api/v1/namespaces/default/serviceaccounts/default"))
    step(f"cluster {cluster.instance.name!r} ready at {cluster.instance.host_url}")


def _wait(cluster: Cluster, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not condition():
        if not cluster.is_running() or time.monotonic() > deadline:
            reason = "was not ready in time" if cluster.is_running() else "ended while it started"
            raise ClusterError(f"cluster {cluster.instance.name!r} {reason}.\n{_evidence(cluster.folder)}")
        time.sleep(0.1)


def _evidence(folder: Path) -> str:
    """The end of the node's log, and of the log of each component that ended."""
    node_log = (folder / "node.log").read_text()
    ended = sorted({line.split()[1] for line in node_log.splitlines() if " ended with code " in line})
    texts = [("node", node_log)]
    texts += [(name, (folder / "logs" / f"{name}.log").read_text(errors="replace")) for name in ended]
    return "\n".join(f"--- {name}\n" + "\n".join(text.splitlines()[-15:]) for name, text in texts)


def _node_has_containerd(cluster: Cluster) -> bool:
    try:
        cluster.run_in_node("ctr", "version")
    except ClusterError:
        return False
    return True


def _node_is_ready(api: Api) -> bool:
    if not _exists(api, f"/api/v1/nodes/{config.NODE_NAME}"):
        return False
    conditions = api.get(f"/api/v1/nodes/{config.NODE_NAME}")["status"].get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _exists(api: Api, path: str) -> bool:
    try:
        api.get(path)
    except ApiError as error:
        if error.status != 404:
            raise
        return False
    return True


# -- find and stop -----------------------------------------------------------------------------------------------


def find(name: str) -> Cluster | None:
    """The running cluster of this name."""
    try:
        instance = Instance.from_json((paths.instance_dir(name) / "instance.json").read_text())
    except FileNotFoundError:
        return None
    cluster = Cluster(instance)
    return cluster if cluster.is_running() else None


def names() -> list[str]:
    """Every cluster that has a folder, running or not."""
    folder = paths.instance_dir("x").parent
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.exists() else []


def down(name: str, report: Report = print) -> None:
    """Stop the cluster and remove all it made. One that does not run is only cleaned up after."""
    started = time.monotonic()
    with binaries.locked(paths.instance_dir(name).with_name(f".{name}.lock")):
        cluster = find(name)
        if cluster:
            _kill(cluster)
        cleaned = _clean(name)
    paths.instance_dir(name).with_name(f".{name}.lock").unlink(missing_ok=True)
    seconds = time.monotonic() - started
    report(f"cluster {name!r} stopped in {seconds:.1f} s" if cleaned else f"no cluster {name!r}")


def _kill(cluster: Cluster) -> None:
    launcher = _launcher_pid(cluster.folder)
    if launcher is not None:
        os.kill(launcher, signal.SIGKILL)


def _added_controllers(folder: Path) -> list[str]:
    try:
        return list(json.loads((folder / "controllers.json").read_text()))
    except FileNotFoundError:
        return []


def _clean(name: str) -> bool:
    """Remove the control groups and the folder of a cluster that no longer runs."""
    folder = paths.instance_dir(name)
    if not folder.exists():
        return False
    cgroups.remove(f"localcluster-{name}", _added_controllers(folder))
    shutil.rmtree(folder)
    return True
