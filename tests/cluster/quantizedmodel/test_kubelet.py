"""What a real kubelet and a real scheduler with a node say when a pod cannot start, carried up within 10 s.

No server image is needed: the pods fail before, or because of, their image. The end-to-end test serves for real.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from localcluster import config, lifecycle
from localcluster.lifecycle import Cluster
from support.operator_process import OperatorProcess
from support.quantizedmodels import Models

pytestmark = pytest.mark.cluster
CPU: dict[str, Any] = {"model": {"uri": "hf://a/b"}, "resources": {"accelerator": "cpu"}}
SECONDS = 10  # from what the API server knows to the condition; the pod's own way there is waited for besides
POD_SECONDS = 60


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    name = "test-kubelet"
    try:
        yield lifecycle.up(name, port=0)
    finally:
        lifecycle.down(name)


@pytest.fixture(scope="module")
def served(node: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    operator = OperatorProcess(node, tmp_path_factory.mktemp("operator"))
    operator.install()
    operator.start()
    yield Models(node, "default")
    operator.stop()


def _wait(models: Models, name: str, reason: str, message: str) -> str:
    return models.wait(name, "Ready", POD_SECONDS + SECONDS, status="False", reason=reason, message=message)["message"]


def test_an_absent_image(served: Models) -> None:
    served.create("absent", {**CPU, "engine": {"image": "localhost/absent:1"}})
    message = _wait(served, "absent", "ImagePullFailed", "localhost/absent:1")
    assert message.startswith("pod absent-") and "container prepare" in message


def test_a_node_without_the_accelerator(served: Models) -> None:
    served.create("gpu", {"model": {"uri": "hf://a/b"}})
    _wait(served, "gpu", "Unschedulable", "Insufficient nvidia.com/gpu")


def test_an_init_container_that_cannot_start(served: Models) -> None:
    """The image has no such command."""
    served.create("command", {**CPU, "engine": {"image": config.PAUSE_IMAGE}})
    message = _wait(
        served, "command", "RunContainerError|StartError|ContainerFailed|CreateContainerError", "manthanquant"
    )
    assert "container prepare" in message


def test_a_node_path_that_is_not_there(served: Models) -> None:
    served.create("path", {**CPU, "model": {"uri": "file:///srv/models/absent"}})
    _wait(served, "path", "FailedMount", "/srv/models/absent is not a directory")


def test_a_claim_that_is_not_there(served: Models) -> None:
    served.create("claim", {**CPU, "model": {"uri": "pvc://absent/m"}})
    _wait(served, "claim", "Unschedulable", 'persistentvolumeclaim "absent" not found')
