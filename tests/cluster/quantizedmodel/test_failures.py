"""What fails is in Ready's message: the pod, the container, its exit code, its words, and the remedy.

The kubelet is played; what the scheduler, the controllers and the quota say is real. The bound of 10 s is the
requirement on the operator: from the moment at which the API server knows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from support.quantizedmodels import REPORT, Models, PlayedKubelet

from manthanquant.contract import PrepareError, PrepareReport

pytestmark = pytest.mark.cluster
SECONDS = 10
CPU: dict[str, Any] = {"model": {"uri": "pvc://weights/m"}, "resources": {"accelerator": "cpu", "memory": "1Gi"}}


def test_an_image_that_cannot_be_pulled(models: Models, kubelet: PlayedKubelet) -> None:
    models.create("m", CPU)
    (pod,) = models.pods("m")
    for reason, message in (
        ("ErrImagePull", 'failed to pull and unpack image "localhost/absent:1": not found'),
        ("ImagePullBackOff", 'Back-off pulling image "localhost/absent:1"'),
    ):
        waiting = {"waiting": {"reason": reason, "message": message}}
        kubelet.report(pod, {"initContainerStatuses": [kubelet.container("prepare", waiting)]})
        found = models.wait("m", "Ready", SECONDS, status="False", reason="ImagePullFailed", message=message)
    name = pod["metadata"]["name"]
    assert found["message"].startswith(f"pod {name}, container prepare: cannot pull localhost/server-cpu:1")


def test_a_cluster_without_the_accelerator(models: Models) -> None:
    """The real scheduler's words."""
    models.create("m", {"model": {"uri": "hf://a/b"}})
    models.wait("m", "Ready", SECONDS, status="False", reason="Unschedulable", message="pod m-.* cannot be scheduled")


def test_a_model_that_is_not_there(models: Models, kubelet: PlayedKubelet) -> None:
    models.create("m", CPU)
    (pod,) = models.pods("m")
    error = PrepareError("ModelNotFound", "no config.json in /models/m: correct the path", "model.uri")
    end = {"exitCode": 3, "reason": "Error", "message": PrepareReport(error=error).to_termination_message()}
    waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}}
    status = kubelet.container("prepare", waiting, lastState={"terminated": end}, restartCount=2)
    kubelet.report(pod, {"initContainerStatuses": [status]})
    found = models.wait("m", "Ready", SECONDS, status="False", reason="ModelNotFound")
    assert found["message"] == (
        f"pod {pod['metadata']['name']}, container prepare ended with exit code 3 (Error, 2 restarts): "
        "spec.model.uri: no config.json in /models/m: correct the path"
    )
    models.wait("m", "ModelReady", SECONDS, status="False", reason="ModelNotFound")


def test_kernels_that_do_not_build(models: Models, kubelet: PlayedKubelet) -> None:
    models.create("m", CPU)
    (pod,) = models.pods("m")
    error = PrepareError("KernelBuildFailed", "g++ was not found: use an image with a compiler")
    report = dataclasses.replace(REPORT, kernel=None, calibration=None, cache=None, error=error)
    end = {"exitCode": 1, "reason": "Error", "message": report.to_termination_message()}
    kubelet.report(pod, {"initContainerStatuses": [kubelet.container("prepare", {"terminated": end})]})
    models.wait("m", "Ready", SECONDS, status="False", reason="KernelBuildFailed", message="use an image with")
    models.wait("m", "KernelReady", SECONDS, status="False", reason="KernelBuildFailed")
    models.wait("m", "ModelReady", SECONDS, status="True", reason="Resolved")


def test_an_init_container_that_dies_without_a_report(models: Models, kubelet: PlayedKubelet) -> None:
    models.create("m", CPU)
    (pod,) = models.pods("m")
    end = {"exitCode": 139, "reason": "Error", "message": "Segmentation fault"}
    kubelet.report(pod, {"initContainerStatuses": [kubelet.container("prepare", {"terminated": end})]})
    models.wait("m", "Ready", SECONDS, status="False", reason="ContainerFailed", message="139 .*Segmentation fault")


@pytest.mark.parametrize("container", ["prepare", "server"])
def test_out_of_memory(container: str, models: Models, kubelet: PlayedKubelet) -> None:
    models.create("m", CPU)
    (pod,) = models.pods("m")
    end = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    status = kubelet.container(container, end)
    field = "initContainerStatuses" if container == "prepare" else "containerStatuses"
    kubelet.report(pod, {field: [status]})
    found = models.wait(
        "m", "Ready", SECONDS, status="False", reason="OOMKilled", message="raise spec.resources.memory"
    )
    assert f"container {container} ended with exit code 137" in found["message"]


def test_a_server_that_crashes_says_its_last_words(models: Models, kubelet: PlayedKubelet) -> None:
    models.create("m", CPU)
    (pod,) = models.pods("m")
    end = {"exitCode": 1, "reason": "Error", "message": "ValueError: head size 72 is not supported"}
    waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}}
    server = kubelet.container("server", waiting, lastState={"terminated": end}, restartCount=4)
    kubelet.report(pod, {"initContainerStatuses": [kubelet.prepared()], "containerStatuses": [server]})
    models.wait("m", "Ready", SECONDS, status="False", reason="ContainerFailed", message="4 restarts.*head size 72")


def test_a_secret_that_is_missing(models: Models, kubelet: PlayedKubelet) -> None:
    models.create("m", {**CPU, "apiKeySecretRef": {"name": "absent", "key": "k"}})
    (pod,) = models.pods("m")
    waiting = {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "absent" not found'}}
    status = {
        "initContainerStatuses": [kubelet.prepared()],
        "containerStatuses": [kubelet.container("server", waiting)],
    }
    kubelet.report(pod, status)
    models.wait(
        "m", "Ready", SECONDS, status="False", reason="CreateContainerConfigError", message='secret "absent" not found'
    )


def test_a_quota_that_forbids_pods(models: Models) -> None:
    """The real quota admission and Deployment controller."""
    models.cluster.kubectl("-n", models.namespace, "create", "quota", "none", "--hard=pods=0")
    models.create("m", CPU)
    models.wait("m", "Ready", 30, status="False", reason="ReplicaFailure", message="exceeded quota")


def test_a_claim_without_a_storage_class(models: Models) -> None:
    claim = {"size": "1Gi", "storageClassName": "absent"}
    models.create("m", {**CPU, "kernelCache": {"persistentVolumeClaim": claim}})
    models.wait(
        "m", "Ready", SECONDS, status="False", reason="Unschedulable", message="without a volume yet: m-kernels"
    )


def test_a_volume_that_cannot_be_mounted_is_only_in_the_pods_events(models: Models, kubelet: PlayedKubelet) -> None:
    """A pod that is bound to a node, waits, and says nothing in its status: its newest warning is read."""
    models.create("m", {**CPU, "model": {"uri": "file:///srv/models/absent"}})
    (pod,) = models.pods("m")
    with kubelet.mount_failure(pod, "hostPath type check failed: /srv/models/absent is not a directory"):
        models.wait("m", "Ready", SECONDS, status="False", reason="FailedMount", message="/srv/models/absent is not a")


def test_a_server_whose_statistics_cannot_be_read_still_serves(models: Models, kubelet: PlayedKubelet) -> None:
    models.create("m", CPU)
    (pod,) = models.pods("m")
    kubelet.ready(pod, stats=None)
    models.wait("m", "TelemetryAvailable", SECONDS, status="False", reason="ScrapeFailed", message="503")
    assert models.condition("m", "Ready")["status"] == "True"


def test_the_failure_goes_when_the_pod_recovers(models: Models, kubelet: PlayedKubelet) -> None:
    models.create("m", CPU)
    (pod,) = models.pods("m")
    end = {"exitCode": 1, "reason": "Error", "message": "boom"}
    kubelet.report(pod, {"initContainerStatuses": [kubelet.container("prepare", {"terminated": end})]})
    models.wait("m", "Ready", SECONDS, status="False", reason="ContainerFailed")
    kubelet.ready(pod)
    models.wait("m", "Ready", SECONDS, status="True", reason="Serving")
