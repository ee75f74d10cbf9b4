"""A model from its five lines to serving, changing and going, with the real API server, scheduler and controllers."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.quantizedmodels import REPORT, STATS, Models, PlayedKubelet, eventually

from manthanquant.contract import LoadStats, Stats, WriteStats

pytestmark = pytest.mark.cluster
README = Path(__file__).parents[3] / "README.md"
CPU: dict[str, Any] = {
    "model": {"uri": "pvc://weights/smollm2"},
    "kvCache": {"memory": "1Gi"},
    "resources": {"accelerator": "cpu"},
}


def test_five_lines_become_a_served_model(models: Models, kubelet: PlayedKubelet) -> None:
    models.create("qwen", {"model": {"uri": "hf://Qwen/Qwen3-8B"}})
    (pod,) = models.pods("qwen")
    assert models.children("qwen").keys() == {
        "Deployment", "ReplicaSet", "Pod", "Service", "ServiceAccount", "PodDisruptionBudget",
    }  # fmt: skip
    kubelet.ready(pod)
    models.wait("qwen", "Ready", status="True", reason="Serving")
    models.wait("qwen", "TelemetryAvailable", status="True")
    status = models.status("qwen")
    assert status["endpoint"] == f"http://qwen.{models.namespace}.svc:8000/v1"
    assert (status["replicas"], status["readyReplicas"]) == (1, 1)
    assert status["kernel"] == {
        "smArch": "cpu-avx512", "digest": "0123abcd", "source": "Built", "buildSeconds": 21.0,
        "transform": "gain", "calibration": "Cached",
    }  # fmt: skip
    cache = status["kvCache"]
    assert (cache["capacityTokens"], cache["compressionRatio"], cache["saved"]) == (229_376, 4.92, "1.5Gi")
    assert cache["source"] == "Measured" and cache["cosineSimilarity"] == 0.984
    row = models.cluster.kubectl("-n", models.namespace, "get", "qm", "qwen").splitlines()
    assert row[0].split() == [
        "NAME",
        "MODEL",
        "FORMAT",
        "RATIO",
        "KV-TOKENS",
        "SAVED",
        "SM",
        "READY",
        "REPLICAS",
        "AGE",
    ]
    assert row[1].split()[1:9] == ["hf://Qwen/Qwen3-8B", "mq3", "4.92", "229376", "1.5Gi", "cpu-avx512", "True", "1"]
    wide = models.cluster.kubectl("-n", models.namespace, "get", "qm", "qwen", "-o", "wide")
    assert "ENDPOINT" in wide and "1 of 1 servers ready" in wide


def test_the_readmes_five_lines(models: Models, kubelet: PlayedKubelet) -> None:
    text = README.read_text().split("```yaml\n")[1].split("```")[0]
    assert len(text.splitlines()) == 5
    models.cluster.kubectl("-n", models.namespace, "apply", "-f", "-", stdin=text)
    name = yaml.safe_load(text)["metadata"]["name"]
    (pod,) = models.pods(name)
    kubelet.ready(pod)
    models.wait(name, "Ready", status="True", reason="Serving")
    (server,) = pod["spec"]["containers"]
    assert {"--max-num-seqs=8", f"--kv-cache-memory-bytes={4 << 30}"} <= set(server["args"])  # what a CPU is given
    assert server["resources"]["requests"] == {"cpu": "500m", "memory": "4Gi"}
    assert pod["status"]["qosClass"] == "Burstable"


def test_the_estimate_comes_before_the_measurement(models: Models, kubelet: PlayedKubelet) -> None:
    models.create("m", CPU)
    (pod,) = models.pods("m")
    kubelet.report(pod, {"initContainerStatuses": [kubelet.prepared()]})
    models.wait("m", "KernelReady", status="True", reason="Built", message="cpu-avx512, built in 21 s")
    models.wait("m", "ModelReady", status="True", reason="Resolved", message="/models, 269.0Mi")
    models.wait("m", "Planned", status="True", reason="Estimated", message="229,376 tokens")
    cache = models.status("m")["kvCache"]
    assert cache["source"] == "Estimated" and cache["capacityTokens"] == 229_376
    assert not cache.keys() & {"writes", "errors", "cosineSimilarity", "measuredAt"}  # not measured: absent


def test_several_servers_are_summed_and_load_is_shown(models: Models, kubelet: PlayedKubelet) -> None:
    models.create("m", {**CPU, "replicas": 2})
    pods = models.pods("m", 2)
    addresses = [kubelet.ready(pod) for pod in pods]

    def summed() -> bool:
        return models.status("m").get("kvCache", {}).get("capacityTokens") == 2 * 229_376

    eventually(summed)
    stats = _stats(3, 4)
    for address in addresses:
        kubelet.stats(address, stats)
    eventually(lambda: models.status("m").get("load", {}).get("requestsRunning") == 6)
    load = models.status("m")["load"]
    assert load["requestsWaiting"] == 8 and load["kvUsagePercent"] == 50
    assert [row["pod"] for row in load["pods"]] == sorted(pod["metadata"]["name"] for pod in pods)


def _stats(running: int, waiting: int) -> Stats:
    return dataclasses.replace(
        STATS, load=LoadStats(running, waiting, 5000, 0.5, 1), writes=WriteStats(calls=10, vectors=20, errors=0)
    )


def test_kubectl_scale_and_suspend(models: Models, kubelet: PlayedKubelet) -> None:
    models.create("m", CPU)
    for pod in models.pods("m"):
        kubelet.ready(pod)
    models.wait("m", "Ready", status="True")
    models.cluster.kubectl("-n", models.namespace, "scale", "qm", "m", "--replicas=3")
    for pod in models.pods("m", 3):
        if pod["status"]["phase"] != "Running":
            kubelet.ready(pod)
    models.wait("m", "Ready", status="True", message="3 of 3")
    models.patch("m", {"spec": {"suspend": True}})
    models.pods("m", 0)
    models.wait("m", "Ready", status="False", reason="Suspended")
    assert "Service" in models.children("m")
    models.patch("m", {"spec": {"suspend": False}})
    assert len(models.pods("m", 3)) == 3


def test_a_changed_child_is_put_right_and_a_deleted_one_is_made_again(models: Models, kubelet: PlayedKubelet) -> None:
    models.create("m", CPU)
    models.pods("m")
    models.wait("m", "Planned", status="True")
    kubectl = models.cluster.kubectl
    kubectl("-n", models.namespace, "scale", "deployment", "m", "--replicas=0")
    kubectl("-n", models.namespace, "patch", "service", "m", "-p", '{"spec":{"ports":[{"port":8000,"targetPort":1}]}}')
    kubectl("-n", models.namespace, "delete", "pdb", "m")
    eventually(lambda: models.child("deployment", "m")["spec"]["replicas"] == 1)
    eventually(lambda: models.child("service", "m")["spec"]["ports"][0]["targetPort"] == "http")
    eventually(lambda: "PodDisruptionBudget" in models.children("m"))


def test_what_is_no_longer_wanted_goes_and_claims_stay(models: Models) -> None:
    spec: dict[str, Any] = {
        **CPU,
        "kernelCache": {"persistentVolumeClaim": {"size": "1Mi"}},
        "networkPolicy": {"enabled": True},
    }
    autoscaling = {"maxReplicas": 3, "target": 80}
    models.create("m", {**spec, "kernelCache": {}, "autoscaling": autoscaling})
    eventually(lambda: {"NetworkPolicy", "HorizontalPodAutoscaler"} <= models.children("m").keys())
    models.patch(
        "m", {"spec": {"networkPolicy": {"enabled": False}, "autoscaling": None, "kernelCache": spec["kernelCache"]}}
    )
    eventually(lambda: not {"NetworkPolicy", "HorizontalPodAutoscaler"} & models.children("m").keys())
    eventually(lambda: "PersistentVolumeClaim" in models.children("m"))
    models.patch("m", {"spec": {"kernelCache": {"persistentVolumeClaim": None}}})
    models.wait("m", "Planned", status="True")
    assert models.children("m")["PersistentVolumeClaim"] == ["m-kernels"]


def test_plan_only_estimates_without_a_server(models: Models, kubelet: PlayedKubelet) -> None:
    models.create("m", {**CPU, "planOnly": True})
    (pod,) = models.pods("m")
    found = models.children("m")
    assert found.keys() == {"Job", "Pod", "ServiceAccount"} and found["Job"][0].startswith("m-plan-")
    report = dataclasses.replace(REPORT, kernel=None, calibration=None)
    kubelet.report(pod, {"phase": "Succeeded", "containerStatuses": [kubelet.prepared(report)]})
    models.wait("m", "Planned", status="True", reason="Estimated")
    models.wait("m", "Ready", status="False", reason="PlanOnly", message="unset spec.planOnly")
    models.wait("m", "KernelReady", status="Unknown", reason="PlanOnly")
    assert models.status("m")["kvCache"]["source"] == "Estimated"
    models.patch("m", {"spec": {"planOnly": False}})
    eventually(lambda: "Deployment" in models.children("m") and "Job" not in models.children("m"))


def test_a_plan_is_compared_with_the_gpus_that_the_nodes_show(models: Models, kubelet: PlayedKubelet) -> None:
    pool = {"pool": models.namespace}
    models.create("m", {"model": {"uri": "hf://a/b"}, "resources": {"nodeSelector": pool}, "planOnly": True})
    (pod,) = models.pods("m")
    report = dataclasses.replace(REPORT, model_bytes=15 << 30)
    kubelet.report(pod, {"phase": "Succeeded", "containerStatuses": [kubelet.prepared(report)]})
    models.wait("m", "Planned", status="True", message="not known: .* label nvidia.com/gpu.memory")
    labels = {"nvidia.com/gpu.memory": "12288", **pool}
    with kubelet.node(f"gpu-{models.namespace}", labels):
        models.patch("m", {"spec": {"engine": {"maxModelLen": 100}}})  # a change has it look again
        first = pod["metadata"]["name"]
        pod = eventually(lambda: next((p for p in models.pods("m") if p["metadata"]["name"] != first), None))
        kubelet.report(pod, {"phase": "Succeeded", "containerStatuses": [kubelet.prepared(report)]})
        models.wait(
            "m", "Ready", status="False", reason="DoesNotFit", message="weights of 15.0Gi .* do not fit in 11.0Gi"
        )


def test_an_object_of_somebody_else_is_left_alone(models: Models) -> None:
    models.cluster.kubectl("-n", models.namespace, "create", "service", "clusterip", "m", "--tcp=80")
    models.create("m", CPU)
    models.wait("m", "Ready", status="False", reason="NameConflict", message="Service m exists and belongs to nobody")
    assert models.child("service", "m")["spec"]["ports"][0]["port"] == 80
    models.cluster.kubectl("-n", models.namespace, "delete", "service", "m")
    models.wait("m", "Planned", status="True")


def test_events_tell_of_changes_once(models: Models, kubelet: PlayedKubelet) -> None:
    models.create("m", CPU)
    (pod,) = models.pods("m")
    kubelet.ready(pod)
    models.wait("m", "Ready", status="True")

    def events() -> list[tuple[str, str]]:
        """Condition and reason of each event, the oldest first."""
        path = f"/api/v1/namespaces/{models.namespace}/events?fieldSelector=involvedObject.kind%3DQuantizedModel"
        items = sorted(models.cluster.api.get(path)["items"], key=lambda e: int(e["metadata"]["resourceVersion"]))
        return [(e["message"].partition(" is ")[0], f"{e['type']} {e['reason']}") for e in items]

    eventually(lambda: ("Ready", "Normal Serving") in events())
    # Ready may well say Progressing twice: the scheduler, which finds no node here, comes in between.
    for condition in {condition for condition, _ in events()}:
        reasons = [reason for told, reason in events() if told == condition]
        assert all(one != next_one for one, next_one in pairwise(reasons)), (condition, reasons)
    described = models.cluster.kubectl("-n", models.namespace, "describe", "qm", "m")
    assert "Ready is True: 1 of 1 servers ready" in described
