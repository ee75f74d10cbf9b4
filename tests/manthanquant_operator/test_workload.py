"""Details of the server's pod that the golden files show, but do not explain."""

from __future__ import annotations

from typing import Any

import pytest
from manthanquant_operator import plan, workload
from manthanquant_operator.settings import Settings

from manthanquant import contract


def _pod(model: Any, settings: Settings) -> dict[str, Any]:
    return workload.deployment(model, plan.make(model, settings))["spec"]["template"]["spec"]


def test_the_pod_is_restricted(make_model: Any, settings: Settings) -> None:
    """The rules of Kubernetes' `restricted` pod security standard, and two of our own."""
    pod = _pod(make_model(), settings)
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False and pod["enableServiceLinks"] is False
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_every_mount_has_its_volume(make_model: Any, settings: Settings) -> None:
    pod = _pod(make_model(), settings)
    volumes = {volume["name"] for volume in pod["volumes"]}
    mounts = {m["name"] for c in (*pod["initContainers"], *pod["containers"]) for m in c["volumeMounts"]}
    assert mounts == volumes


def test_writable_places_are_the_contracts(make_model: Any, settings: Settings) -> None:
    server = _pod(make_model(), settings)["containers"][0]
    writable = {mount["mountPath"] for mount in server["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {contract.KERNEL_CACHE_DIR, contract.WORK_DIR, "/tmp", "/dev/shm"}


def test_a_node_path_is_never_writable(make_model: Any, settings: Settings) -> None:
    pod = _pod(make_model({"model": {"uri": "file:///srv/models/a"}}), settings)
    for container in (*pod["initContainers"], *pod["containers"]):
        (mount,) = [m for m in container["volumeMounts"] if m["name"] == "models"]
        assert mount["readOnly"] is True


def test_slow_loads_are_not_killed(make_model: Any, settings: Settings) -> None:
    model = make_model({"engine": {"startupTimeoutSeconds": 7200}})
    deployment = workload.deployment(model, plan.make(model, settings))
    probe = deployment["spec"]["template"]["spec"]["containers"][0]["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 7200
    assert deployment["spec"]["progressDeadlineSeconds"] > 7200


def test_a_stop_leaves_time_to_drain(make_model: Any, settings: Settings) -> None:
    pod = _pod(make_model({"engine": {"drainSeconds": 300}}), settings)
    sleep = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > 300 + sleep


def test_the_users_variable_replaces_ours_once(make_model: Any, settings: Settings) -> None:
    env = _pod(make_model({"engine": {"env": [{"name": "HOME", "value": "/tmp"}]}}), settings)["containers"][0]["env"]
    assert [item for item in env if item["name"] == "HOME"] == [{"name": "HOME", "value": "/tmp"}]


def test_a_gpu_is_asked_for_by_both_containers_and_a_cpu_server_asks_none(make_model: Any, settings: Settings) -> None:
    pod = _pod(make_model({"resources": {"count": 2}}), settings)
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    cpu = _pod(make_model({"resources": {"accelerator": "cpu"}}), settings)
    assert "limits" not in cpu["containers"][0]["resources"]


def test_no_pod_is_best_effort(make_model: Any, settings: Settings) -> None:
    """Such pods are the first to be evicted. The user's own values win."""

    def requests(spec: dict[str, Any]) -> dict[str, str]:
        (server,) = _pod(make_model(spec), settings)["containers"]
        return server["resources"]["requests"]

    assert requests({}) == {"cpu": "500m", "nvidia.com/gpu": "1"}
    cpu = {"accelerator": "cpu"}
    assert requests({"resources": cpu}) == {"cpu": "500m", "memory": "4Gi"}
    assert requests({"resources": cpu, "kvCache": {"memory": "1Gi"}}) == {"cpu": "500m", "memory": "1Gi"}
    own = {"cpu": "8", "memory": "6Gi"}
    assert requests({"resources": {**cpu, **own}, "kvCache": {"memory": "1Gi"}}) == own


@pytest.mark.parametrize(
    ("capability", "nodes"),
    [
        ("8.6", {(8, 0): False, (8, 6): True, (8, 9): True, (9, 0): True, (7, 5): False, None: True}),
        ("9.0", {(8, 9): False, (9, 0): True, (10, 0): True, None: True}),
    ],
)
def test_min_compute_capability_selects_nodes(
    capability: str, nodes: dict[tuple[int, int] | None, bool], make_model: Any, settings: Settings
) -> None:
    pod = _pod(make_model({"resources": {"minComputeCapability": capability}}), settings)
    terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]

    def matches(expression: dict[str, Any], labels: dict[str, str]) -> bool:
        value = labels.get(expression["key"])
        if expression["operator"] == "DoesNotExist":
            return value is None
        if value is None:
            return False
        return (
            value in expression["values"]
            if expression["operator"] == "In"
            else int(value) > int(expression["values"][0])
        )

    for node, expected in nodes.items():
        labels = (
            dict(zip(("nvidia.com/gpu.compute.major", "nvidia.com/gpu.compute.minor"), map(str, node))) if node else {}
        )
        assert any(all(matches(e, labels) for e in term["matchExpressions"]) for term in terms) is expected, node


def test_a_planning_job_is_named_by_its_content_and_takes_no_gpu(make_model: Any, settings: Settings) -> None:
    def job(spec: dict[str, Any]) -> dict[str, Any]:
        model = make_model({"planOnly": True, **spec})
        return workload.plan_job(model, plan.make(model, settings))

    first, same, other = job({}), job({"replicas": 5}), job({"kvCache": {"format": "mq4"}})
    assert first["metadata"]["name"] == same["metadata"]["name"] != other["metadata"]["name"]
    (container,) = first["spec"]["template"]["spec"]["containers"]
    assert container["name"] == contract.PREPARE_CONTAINER
    assert container["resources"] == {"requests": {"cpu": "500m"}}


def test_the_environment_speaks_the_contracts_names(make_model: Any, settings: Settings) -> None:
    model = make_model({"kvCache": {"skipLayers": [3, 1]}})
    env = {e["name"]: e.get("value") for e in _pod(model, settings)["initContainers"][0]["env"]}
    assert env[contract.ENV_MODEL_URI] == "hf://Qwen/Qwen3-8B"
    assert env[contract.ENV_FORMAT] == "mq3" and env[contract.ENV_MODE] == "compressed"
    assert env[contract.ENV_SKIP_LAYERS] == "1,3"
    assert env[contract.ENV_CACHE_DIR] == contract.KERNEL_CACHE_DIR
