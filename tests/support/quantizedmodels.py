"""QuantizedModels in a control plane without a node, and a stand-in for the kubelet that is missing there.

The control-plane tests have no kubelet: `PlayedKubelet` writes the pods' status in its place, exactly as a kubelet
reports it. The end-to-end tests run the same paths with a real one.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localcluster.api import ApiError
from localcluster.lifecycle import Cluster

from manthanquant.contract import (
    CacheReport,
    CalibrationReport,
    KernelReport,
    LoadStats,
    PrepareReport,
    Stats,
    WriteStats,
)

GROUP = "/apis/manthanquant.io/v1alpha1"


def eventually(condition: Callable[[], Any], seconds: float = 60, what: Callable[[], object] = lambda: "") -> Any:
    """The first true value of `condition`; fails with `what()` when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"did not come true in {seconds} s: {what()}"
        time.sleep(0.05)
    return value


@dataclass
class Models:
    """QuantizedModels in one namespace."""

    cluster: Cluster
    namespace: str

    def create(self, name: str, spec: dict[str, Any]) -> dict[str, Any]:
        """Creates a model. Raises `ApiError` with the API server's words."""
        body = {
            "apiVersion": "manthanquant.io/v1alpha1",
            "kind": "QuantizedModel",
            "metadata": {"name": name},
            "spec": spec,
        }
        path = f"{GROUP}/namespaces/{self.namespace}/quantizedmodels"
        return json.loads(self.cluster.api.request("POST", path, body))

    def get(self, name: str) -> dict[str, Any]:
        return self.cluster.api.get(f"{GROUP}/namespaces/{self.namespace}/quantizedmodels/{name}")

    def patch(self, name: str, patch: dict[str, Any]) -> None:
        self.cluster.kubectl("-n", self.namespace, "patch", "qm", name, "--type=merge", "-p", json.dumps(patch))

    def delete(self, name: str) -> None:
        self.cluster.kubectl("-n", self.namespace, "delete", "qm", name, "--wait=false")

    def status(self, name: str) -> dict[str, Any]:
        return self.get(name).get("status", {})

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        found = self.status(name).get("conditions", [])
        return next((c for c in found if c["type"] == kind), {"status": "", "reason": "", "message": ""})

    def wait(self, name: str, kind: str, seconds: float = 60, **wanted: str) -> dict[str, Any]:
        """Waits for a condition whose fields match the wanted regular expressions, and returns it."""

        def matches() -> dict[str, Any] | None:
            condition = self.condition(name, kind)
            good = all(re.search(pattern, condition[field], re.DOTALL) for field, pattern in wanted.items())
            return condition if good and condition["status"] else None

        return eventually(matches, seconds, lambda: self.condition(name, kind))

    def children(self, name: str) -> dict[str, list[str]]:
        """Names of everything with the model's label, by kind."""
        kinds = "deployments,replicasets,jobs,pods,services,serviceaccounts,pvc,pdb,networkpolicies,hpa"
        output = self.cluster.kubectl(
            "-n", self.namespace, "get", kinds, "-l", f"manthanquant.io/model={name}", "-o", "json"
        )
        found: dict[str, list[str]] = {}
        for item in json.loads(output)["items"]:
            found.setdefault(item["kind"], []).append(item["metadata"]["name"])
        return found

    def child(self, kind: str, name: str) -> dict[str, Any]:
        return json.loads(self.cluster.kubectl("-n", self.namespace, "get", kind, name, "-o", "json"))

    def pods(self, name: str, count: int = 1) -> list[dict[str, Any]]:
        """The model's pods, once there are so many."""
        path = f"/api/v1/namespaces/{self.namespace}/pods?labelSelector=manthanquant.io%2Fmodel%3D{name}"

        def found() -> list[dict[str, Any]]:
            return [pod for pod in self.cluster.api.get(path)["items"] if "deletionTimestamp" not in pod["metadata"]]

        eventually(lambda: len(found()) == count, what=lambda: self.children(name))
        return found()


REPORT = PrepareReport(
    model_path="/models",
    model_bytes=269 << 20,
    kernel=KernelReport("cpu-avx512", "Built", "0123abcd", 21.4),
    calibration=CalibrationReport("gain", "Calibrated", 6.0),
    cache=CacheReport("k42v3", "compressed", 3.25, 2340, 11520, 4.923, 1 << 30, 0, 229_376, 46_592),
)
STATS = Stats(
    model="m",
    kernel=KernelReport("cpu-avx512", "Cached", "0123abcd"),
    calibration=CalibrationReport("gain", "Cached"),
    cache=CacheReport("k42v3", "compressed", 3.25, 2340, 11520, 4.923, 1 << 30, 0, 229_376, 46_592, 1_568_669_696),
    uptime_seconds=12.0,
    writes=WriteStats(100, 4800, 614_400, 124_800, 0, 480, 0.985, 0.983, 0.034),
    load=LoadStats(1, 0, 1000, 0.034, 0),
)


@dataclass
class PlayedKubelet:
    """Stands in for the kubelet: reports pods' status as a kubelet would."""

    cluster: Cluster
    folder: Path  # of `support.stats_server`
    addresses: Iterator[str]

    def report(self, pod: dict[str, Any], status: dict[str, Any]) -> None:
        metadata = pod["metadata"]
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/status"

        def written() -> bool:
            current = self.cluster.api.get(path)
            try:
                self.cluster.api.request("PUT", path, {**current, "status": {**current["status"], **status}})
            except ApiError as error:
                if error.status != 409:  # the scheduler was faster
                    raise
                return False
            return True

        eventually(written)

    @contextlib.contextmanager
    def mount_failure(self, pod: dict[str, Any], message: str) -> Iterator[None]:
        """The pod is on a node, which warns in an event that a volume cannot be mounted."""
        name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
        with self.node(f"stand-in-{namespace}") as node:
            target = {"apiVersion": "v1", "kind": "Node", "name": node}
            binding = {"metadata": {"name": name}, "target": target}
            self.cluster.api.request("POST", f"/api/v1/namespaces/{namespace}/pods/{name}/binding", binding)
            event = {
                "metadata": {"generateName": "mount-", "namespace": namespace},
                "involvedObject": {"kind": "Pod", "namespace": namespace, "name": name, "uid": pod["metadata"]["uid"]},
                "type": "Warning",
                "reason": "FailedMount",
                "message": message,
            }
            self.cluster.api.request("POST", f"/api/v1/namespaces/{namespace}/events", event)
            yield

    @contextlib.contextmanager
    def node(self, name: str, labels: dict[str, str] | None = None) -> Iterator[str]:
        """A node without a kubelet."""
        metadata = {"name": name, "labels": labels or {}}
        self.cluster.api.create("/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": metadata})
        try:
            yield name
        finally:
            self.cluster.api.delete(f"/api/v1/nodes/{name}")

    def container(self, name: str, state: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {
            "name": name, "state": state, "ready": False, "restartCount": 0, "image": "localhost/server-cpu:1",
            "imageID": "", "lastState": {}, **more,
        }  # fmt: skip

    def prepared(self, report: PrepareReport = REPORT) -> dict[str, Any]:
        end = {"exitCode": 0, "reason": "Completed", "message": report.to_termination_message()}
        return self.container("prepare", {"terminated": end}, ready=True)

    def ready(self, pod: dict[str, Any], stats: Stats | None = STATS) -> str:
        """The pod serves. Returns its address."""
        address = next(self.addresses)
        if stats:
            self.stats(address, stats)
        times = {"lastTransitionTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        conditions = [
            {"type": kind, "status": "True", **times}
            for kind in ("PodScheduled", "Initialized", "ContainersReady", "Ready")
        ]
        running = {"running": {"startedAt": times["lastTransitionTime"]}}
        self.report(
            pod,
            {
                "phase": "Running",
                "podIP": address,
                "podIPs": [{"ip": address}],
                "conditions": conditions,
                "initContainerStatuses": [self.prepared()],
                "containerStatuses": [self.container("server", running, ready=True, started=True)],
            },
        )
        return address

    def stats(self, address: str, stats: Stats) -> None:
        path = self.folder / f"{address}.json"
        path.with_suffix(".new").write_text(stats.to_json())
        path.with_suffix(".new").rename(path)
