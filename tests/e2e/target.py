"""The cluster that the demo runs on: one of its own, or that of the current kubectl context."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from localcluster import paths

POLL_SECONDS = 1.0


class DemoError(RuntimeError):
    """A step that failed; the text has the evidence and, where there is one, the remedy."""


@dataclasses.dataclass(frozen=True)
class Target:
    """kubectl and helm against one cluster. `kubeconfig` None means the caller's own context."""

    kubeconfig: Path | None
    operator_image: str
    server_image: str

    def _command(self, program: str, arguments: tuple[str, ...]) -> list[str]:
        own = str(paths.bin_dir() / program)
        found = own if self.kubeconfig else shutil.which(program) or own
        return [found, *(["--kubeconfig", str(self.kubeconfig)] if self.kubeconfig else []), *arguments]

    def _run(self, program: str, arguments: tuple[str, ...], stdin: str | None) -> str:
        command = self._command(program, arguments)
        done = subprocess.run(command, input=stdin, capture_output=True, text=True)
        if done.returncode:
            raise DemoError(f"{program} {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return self._run("kubectl", arguments, stdin)

    def helm(self, *arguments: str) -> str:
        return self._run("helm", arguments, None)

    def apply(self, *objects: dict[str, Any]) -> None:
        self.kubectl("apply", "--filename=-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))

    def get(self, *arguments: str) -> Any:
        """An object or a list; None where it does not exist."""
        text = self.kubectl("get", *arguments, "--ignore-not-found", "--output=json")
        return json.loads(text) if text.strip() else None

    def stream(self, *arguments: str, stdin: IO[bytes] | None = None, stdout: IO[bytes] | None = None) -> None:
        """kubectl with files in place of its standard streams."""
        source = stdin or subprocess.DEVNULL
        sink = stdout or subprocess.DEVNULL
        command = self._command("kubectl", arguments)
        done = subprocess.run(command, stdin=source, stdout=sink, stderr=subprocess.PIPE)
        if done.returncode:
            raise DemoError(f"kubectl {' '.join(arguments)}: {done.stderr.decode().strip()}")

    @contextmanager
    def port_forward(self, namespace: str, resource: str, port: int) -> Iterator[int]:
        """A free port on 127.0.0.1 that leads to `resource`'s `port` while the context lasts."""
        arguments = ("--namespace", namespace, "port-forward", resource, f":{port}")
        command = self._command("kubectl", arguments)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        try:
            first = process.stdout.readline()  # Forwarding from 127.0.0.1:PORT -> 8000
            if not first.startswith("Forwarding from"):
                raise DemoError(f"kubectl {' '.join(arguments)}: {first}{process.stdout.read()}")
            yield int(first.split()[2].rpartition(":")[2])
        finally:
            process.terminate()
            process.wait()


def wait_for(what: str, seconds: float, condition: Callable[[], Any]) -> Any:
    """The first true value of `condition`. Raises `DemoError` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise DemoError(f"{what} did not happen in {seconds:.0f} s")
        time.sleep(POLL_SECONDS)
    return value


def current_context() -> Target:
    """The target of CLUSTER=current. Raises `DemoError` with what it needs when the images are not named."""
    operator, server = os.environ.get("OPERATOR_IMAGE"), os.environ.get("SERVER_IMAGE")
    if not operator or not server:
        raise DemoError(
            "CLUSTER=current needs two images that the cluster can pull, or has loaded:\n"
            "  docker build --target operator   -t REGISTRY/manthanquant-operator:dev .\n"
            "  docker build --target server-cpu -t REGISTRY/manthanquant-server:cpu-dev .\n"
            "  docker push ...            (kind: kind load docker-image ...; k3s: k3s ctr images import ...)\n"
            "then: make demo CLUSTER=current OPERATOR_IMAGE=REGISTRY/manthanquant-operator:dev "
            "SERVER_IMAGE=REGISTRY/manthanquant-server:cpu-dev"
        )
    return Target(None, operator, server)
