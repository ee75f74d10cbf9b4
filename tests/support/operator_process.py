"""The real operator as a process, with the rights that the chart gives it and no others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from localcluster import binaries, config
from localcluster.lifecycle import Cluster

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/manthanquant"
NAMESPACE = "manthanquant-system"
ACCOUNT = "manthanquant"
VALUES = (
    "telemetry.intervalSeconds=1",
    "leaderElection.leaseSeconds=12",
    "allowedHostPaths={/srv/models}",
    "images.cpu.repository=localhost/server-cpu",
)


def helm(*arguments: str, cluster: Cluster | None = None) -> str:
    """Runs helm and returns what it prints."""
    program = binaries.ensure((binaries.HELM,)) / "helm"
    environment = {**os.environ, **({"KUBECONFIG": str(cluster.kubeconfig)} if cluster else {})}
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"helm {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def render(*values: str, namespace: str = NAMESPACE) -> list[dict[str, Any]]:
    """The chart's objects."""
    settings = [item for value in values for item in ("--set", value)]
    version = ("--kube-version", config.KUBERNETES_VERSION)
    text = helm("template", ACCOUNT, str(CHART), "--namespace", namespace, *version, *settings)
    return [obj for obj in yaml.safe_load_all(text) if obj]


@dataclass
class OperatorProcess:
    """An operator that is started, killed and started again. It runs in the cluster's network, as a pod would."""

    cluster: Cluster
    folder: Path
    health_port: int = 8080
    process: subprocess.Popen[bytes] | None = None
    _log_start: int = 0
    _audit_read: int = 0
    _requests: list[dict[str, Any]] = field(default_factory=list)
    values: tuple[str, ...] = field(default=VALUES)

    def install(self) -> None:
        """Installs the chart's objects, except the operator's pod, and makes a kubeconfig of its account."""
        objects = [o for o in render(*self.values) if o["kind"] != "Deployment"]
        self.cluster.kubectl("create", "namespace", NAMESPACE)
        self.cluster.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(objects))
        self.cluster.kubectl("wait", "--for=condition=Established", "crd/quantizedmodels.manthanquant.io")
        (settings,) = (o["data"]["settings.yaml"] for o in objects if o["kind"] == "ConfigMap")
        content = {**yaml.safe_load(settings), "healthPort": self.health_port, "resyncSeconds": 10}
        (self.folder / "settings.yaml").write_text(yaml.safe_dump(content))
        token = self.cluster.kubectl("-n", NAMESPACE, "create", "token", ACCOUNT, "--duration=24h").strip()
        authority = json.loads(self.cluster.kubeconfig.read_text())["clusters"][0]["cluster"]
        kubeconfig = config.kubeconfig(config.NODE_API_URL, authority["certificate-authority-data"], token)
        (self.folder / "kubeconfig").touch(mode=0o600)
        (self.folder / "kubeconfig").write_text(json.dumps(kubeconfig))

    def twin(self, folder: Path, health_port: int) -> OperatorProcess:
        """Another operator of the same installation."""
        content = yaml.safe_load((self.folder / "settings.yaml").read_text())
        (folder / "settings.yaml").write_text(yaml.safe_dump({**content, "healthPort": health_port}))
        (folder / "kubeconfig").write_text((self.folder / "kubeconfig").read_text())
        return OperatorProcess(self.cluster, folder, health_port)

    @property
    def user(self) -> str:
        return f"system:serviceaccount:{NAMESPACE}:{ACCOUNT}"

    @property
    def log(self) -> str:
        """What it said since its last start."""
        return self._log_file.read_text()[self._log_start :]

    @property
    def _log_file(self) -> Path:
        return self.folder / "operator.log"

    def is_leading(self) -> bool:
        return "leading as" in self.log

    def start(self) -> None:
        assert self.process is None, "it runs already"
        environment = {
            **os.environ,
            "KUBECONFIG": str(self.folder / "kubeconfig"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "operator")]),
        }
        command = [
            sys.executable,
            "-m",
            "manthanquant_operator",
            "run",
            "--settings",
            str(self.folder / "settings.yaml"),
        ]
        with self._log_file.open("ab") as log:
            self._log_start = log.tell()
            self.process = subprocess.Popen(
                self.cluster.in_network(*command), env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def ensure(self) -> None:
        """Starts it again if it ended, as the kubelet would: a starved operator loses its Lease, and must end."""
        if self.process and self.process.poll() is not None:
            self.process = None
        if self.process is None:
            self.start()

    def kill(self) -> None:
        """SIGKILL: no chance to tidy up."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process = None

    def stop(self) -> int:
        """SIGTERM, as Kubernetes stops a pod. Returns the exit status."""
        assert self.process is not None
        self.process.terminate()
        try:
            return self.process.wait(timeout=30)
        finally:
            self.process.kill()
            self.process = None

    def rss_mib(self) -> float:
        """Resident memory in MiB."""
        assert self.process is not None
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise AssertionError("no VmRSS")

    def requests(self) -> list[dict[str, Any]]:
        """Every request of the operator that the API server logged, its watches included."""
        with self.cluster.audit_log.open() as log:
            log.seek(self._audit_read)
            while (line := log.readline()).endswith("\n"):
                self._audit_read = log.tell()
                event = json.loads(line)
                if event["user"]["username"] == self.user:
                    self._requests.append(event)
        return list(self._requests)

    def writes(self) -> list[dict[str, Any]]:
        """The requests that change something, without the Lease's renewals."""
        return [
            event
            for event in self.requests()
            if event["verb"] not in ("get", "list", "watch") and event["objectRef"]["resource"] != "leases"
        ]

    def settle(self, quiet: float = 3.0, timeout: float = 60.0) -> None:
        """Waits until it has written nothing for a while."""
        deadline, count, since = time.monotonic() + timeout, -1, time.monotonic()
        while time.monotonic() - since < quiet:
            if (now := len(self.writes())) != count:
                count, since = now, time.monotonic()
            assert time.monotonic() < deadline, f"still writing after {timeout} s: {self.writes()[-3:]}"
            time.sleep(0.2)
