"""The operator dies, comes back, meets another one, or is away while models go; nothing is doubled, nothing is left."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from localcluster import cgroups, config
from support.operator_process import NAMESPACE, OperatorProcess
from support.quantizedmodels import Models, PlayedKubelet, eventually

pytestmark = pytest.mark.cluster
CPU: dict[str, Any] = {
    "model": {"uri": "hf://a/b", "cache": {"size": "1Mi"}},
    "resources": {"accelerator": "cpu"},
    "kernelCache": {"persistentVolumeClaim": {"size": "1Mi"}},
}
ONE_OF_EACH = {
    "Deployment": ["m"],
    "Service": ["m"],
    "ServiceAccount": ["m"],
    "PodDisruptionBudget": ["m"],
    "PersistentVolumeClaim": ["m-kernels", "m-models"],
}


def _made(models: Models, name: str) -> dict[str, list[str]]:
    return {kind: sorted(names) for kind, names in models.children(name).items() if kind not in ("Pod", "ReplicaSet")}


@pytest.mark.parametrize("writes", [1, 3, 5])  # of seven: an account, two claims, a Service, a budget, the Deployment
def test_killed_after_any_write_it_converges_and_doubles_nothing(
    writes: int, models: Models, operator: OperatorProcess
) -> None:
    """SIGKILL as soon as the API server has seen so many writes for a new model: in the midst of its children."""
    operator.settle()
    before = len(operator.writes())
    models.create("m", CPU)
    eventually(lambda: len(operator.writes()) >= before + writes)
    operator.kill()
    operator.start()
    eventually(lambda: _made(models, "m") == ONE_OF_EACH, 60, lambda: models.children("m"))
    models.wait("m", "Planned", 60, status="True")
    operator.settle()
    assert len(models.pods("m")) == 1
    assert len(models.children("m")["ReplicaSet"]) == 1


def test_a_restart_without_a_change_changes_nothing(
    models: Models, kubelet: PlayedKubelet, operator: OperatorProcess
) -> None:
    models.create("m", CPU)
    (pod,) = models.pods("m")
    kubelet.ready(pod)
    models.wait("m", "Ready", status="True")
    models.wait("m", "TelemetryAvailable", status="True")
    operator.settle()
    before = (models.get("m"), models.child("deployment", "m")["metadata"], models.child("service", "m")["metadata"])
    operator.kill()
    operator.start()
    count = len(operator.writes())
    eventually(lambda: len(operator.writes()) > count)  # it applies its children once more, which changes nothing
    operator.settle()
    after = (models.get("m"), models.child("deployment", "m")["metadata"], models.child("service", "m")["metadata"])
    assert after == before


def test_a_model_deleted_while_the_operator_is_down_leaves_nothing(models: Models, operator: OperatorProcess) -> None:
    models.create("m", CPU)
    eventually(lambda: _made(models, "m") == ONE_OF_EACH)
    assert "finalizers" not in models.get("m")["metadata"]
    operator.settle()
    operator.kill()
    try:
        models.delete("m")
        eventually(lambda: models.children("m") == {}, 60, lambda: models.children("m"))
    finally:
        operator.start()


def test_a_model_made_while_the_operator_is_down_is_served_afterwards(
    models: Models, operator: OperatorProcess
) -> None:
    operator.kill()
    models.create("m", CPU)
    operator.start()
    eventually(lambda: _made(models, "m") == ONE_OF_EACH, 60)


def test_a_model_deleted_and_made_again_at_once(models: Models, operator: OperatorProcess) -> None:
    models.create("m", CPU)
    eventually(lambda: _made(models, "m") == ONE_OF_EACH)
    first = models.child("deployment", "m")["metadata"]["uid"]
    models.delete("m")
    eventually(lambda: "m" not in models.cluster.kubectl("-n", models.namespace, "get", "qm", "-o", "name").split("/"))
    models.create("m", CPU)
    owner = models.get("m")["metadata"]["uid"]

    def made_again() -> bool:
        found = models.children("m").get("Deployment") and models.child("deployment", "m")["metadata"]
        return bool(found) and found["uid"] != first and found["ownerReferences"][0]["uid"] == owner

    eventually(made_again, 60)
    models.wait("m", "Planned", 60, status="True")


def test_of_two_operators_one_acts(models: Models, operator: OperatorProcess, tmp_path: Path) -> None:
    """The second waits for the Lease, and takes over when the first is killed."""
    second = operator.twin(tmp_path, health_port=8081)
    second.start()
    try:
        time.sleep(14)  # longer than the Lease's duration
        assert not second.is_leading()
        models.create("m", CPU)
        eventually(lambda: _made(models, "m") == ONE_OF_EACH)
        operator.kill()
        eventually(second.is_leading)
        models.patch("m", {"spec": {"service": {"port": 9000}}})
        eventually(lambda: models.child("service", "m")["spec"]["ports"][0]["port"] == 9000)
    finally:
        second.stop()
        operator.ensure()


def test_a_stop_is_clean_and_frees_the_lease(operator: OperatorProcess) -> None:
    eventually(operator.is_leading)
    status = operator.stop()

    def holder() -> str:
        return operator.cluster.kubectl(
            "-n", NAMESPACE, "get", "lease", "manthanquant", "-o", "jsonpath={.spec.holderIdentity}"
        )

    try:
        assert (status, holder()) == (0, "")
    finally:
        operator.start()
    eventually(lambda: holder() != "")


def test_an_api_server_that_restarts_is_met_again(models: Models, operator: OperatorProcess) -> None:
    """Every watch is dropped and every request fails for a while."""
    models.create("m", CPU)
    eventually(lambda: _made(models, "m") == ONE_OF_EACH)
    for pid in cgroups.running(models.cluster.instance.cgroup, f"{config.NODE_BIN}/kube-apiserver"):
        os.kill(pid, signal.SIGKILL)
    eventually(models.cluster.api.ready)

    def kubelet_and(condition: Callable[[], bool]) -> Callable[[], bool]:
        def check() -> bool:
            operator.ensure()  # it ends where it could not renew its Lease in time, and the kubelet starts it again
            return condition()

        return check

    models.create("n", {"model": {"uri": "hf://a/b"}, "resources": {"accelerator": "cpu"}})
    eventually(kubelet_and(lambda: "Deployment" in models.children("n")), 120)
    models.patch("m", {"spec": {"service": {"port": 9000}}})
    eventually(kubelet_and(lambda: models.child("service", "m")["spec"]["ports"][0]["port"] == 9000), 120)
