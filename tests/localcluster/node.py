"""The node's pid 1: `python -m localcluster.node NAME LISTEN_FD`, in new namespaces.

It sets up mounts and addresses, starts the components in order and again when one ends, reaps orphans, and forwards
connections from the host's port, whose listening socket it inherits, to the API server in its own network namespace.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from localcluster import cgroups, config, paths
from localcluster.api import Api

RESTART_SECONDS = 1.0
# The kubelet insists on writing these host-wide settings. It gets files to write to; the host keeps its values.
SHADOWED_SYSCTLS = {"vm/overcommit_memory": "1", "kernel/panic": "10", "kernel/panic_on_oops": "1"}
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "PYTHONPATH": str(paths.SOURCE_DIR.parent),
}


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def set_up_mounts(instance: config.Instance, folder: Path) -> None:
    """Give the node its own /run, /var/lib, /var/log and cgroups; what it writes there stays in `folder`."""
    _run("mount", "--make-rshared", "/")  # mounts made in the node must reach its pods
    # Open both before /run and /var/lib are covered: either may lie there.
    held = {target: os.open(source, os.O_PATH) for target, source in _bound(instance, folder).items()}
    _run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    for target, descriptor in held.items():
        Path(target).mkdir(parents=True, exist_ok=True)
        _run("mount", "--no-canonicalize", "--bind", f"/proc/{os.getpid()}/fd/{descriptor}", target)
        os.close(descriptor)
    cgroups.remount()
    for name, value in SHADOWED_SYSCTLS.items():
        shadow = Path(config.NODE_DIR, "sysctl", name.replace("/", "_"))
        shadow.write_text(value + "\n")
        _run("mount", "--bind", str(shadow), f"/proc/sys/{name}")


def _bound(instance: config.Instance, folder: Path) -> dict[str, Path]:
    """What the node sees, and where it lies on the host; in the order in which it is bound."""
    own = {
        config.NODE_DIR: folder,
        config.NODE_BIN: paths.bin_dir(),
        "/var/lib": folder / "var-lib",
        "/var/log": folder / "var-log",
    }
    return {**own, "/var/lib/containerd": paths.image_store()} if instance.shared_images else own


def set_up_network(nodes: bool) -> None:
    """Addresses on the loopback interface, and no way out: traffic of pods cannot leave this namespace."""
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "address", "add", f"{config.NODE_IP}/32", "dev", "lo")
    # Without a default route the node needs one for the Services' addresses, which kube-proxy then rewrites.
    _run("ip", "route", "add", config.SERVICE_CIDR, "dev", "lo", "src", config.NODE_IP)
    if nodes:
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        Path("/proc/sys/net/bridge/bridge-nf-call-iptables").write_text("1")


class Supervisor:
    """Keeps the components running; each one's output goes to `logs/<name>.log`."""

    def __init__(self) -> None:
        self._running: dict[int, config.Component] = {}

    def start(self, component: config.Component) -> None:
        output = f"{config.NODE_DIR}/logs/{component.name}.log"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, output, flags, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        pid = os.posix_spawnp(component.argv[0], component.argv, ENVIRONMENT, file_actions=actions)
        self._running[pid] = component
        log(f"{component.name} started")

    def reap(self) -> None:
        """Collect every ended child: a component is started again, an orphan of a pod is only collected."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            component = self._running.pop(pid, None)
            if component:
                log(f"{component.name} ended with code {os.waitstatus_to_exitcode(status)}")
                asyncio.get_running_loop().call_later(RESTART_SECONDS, self.start, component)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:  # a peer that went away ends its half of the connection, no more
        writer.close()


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", config.API_PORT)
    except OSError:  # the API server is not up yet; the client tries again
        writer.close()
        return
    await asyncio.gather(_copy(reader, server_writer), _copy(server_reader, writer))
    server_writer.close()
    writer.close()


async def run(instance: config.Instance, listener: socket.socket) -> None:
    supervisor = Supervisor()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGCHLD, supervisor.reap)
    server = await asyncio.start_server(_forward, sock=listener)
    components = config.components(instance, sys.executable)
    for component in components:
        if not component.after_api:
            supervisor.start(component)
    api = Api(Path(config.kubeconfig_path(config.ADMIN)))
    while not await asyncio.to_thread(api.ready):
        await asyncio.sleep(0.1)
    log("API server ready")
    for component in components:
        if component.after_api:
            supervisor.start(component)
    await server.serve_forever()


def main(name: str, listen_fd: str) -> None:
    folder = paths.instance_dir(name)
    instance = config.Instance.from_json((folder / "instance.json").read_text())
    # A component that held the listening socket, or the image store's lock, could outlive this process with it.
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the folder's own descriptor is closed by now
            os.set_inheritable(int(descriptor), int(descriptor) <= 2)
    listener = socket.socket(fileno=int(listen_fd))
    socket.sethostname(config.NODE_NAME)
    set_up_mounts(instance, folder)
    set_up_network(instance.nodes)
    asyncio.run(run(instance, listener))


if __name__ == "__main__":
    main(*sys.argv[1:])
