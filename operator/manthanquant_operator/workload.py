"""Spec -> the server's pod, and the Deployment or planning Job that holds it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from manthanquant import contract

from . import names
from .api import CPU, QuantizedModel, Toleration
from .plan import Plan
from .quantity import quantity_of

USER_ID = 1000
DEFAULT_CPU_REQUEST = "500m"  # small, so that it can be scheduled anywhere; a server uses whatever else is free
STARTUP_PERIOD_SECONDS = 5
ENDPOINT_REMOVAL_SECONDS = 5  # the Service still sends requests for a moment after a pod is asked to stop
TEXT_DIR = "/etc/manthanquant"  # the user's calibration text
EXIT_SECONDS = 15  # from the last answer to the process' end

_CACHE_ENV = {
    "VLLM_CACHE_ROOT": "vllm",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "XDG_CACHE_HOME": "xdg",
}


def deployment(qm: QuantizedModel, plan: Plan) -> dict[str, Any]:
    """The servers. New pods wait for old ones to free their accelerators: a full cluster can still be updated."""
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": names.metadata(qm, qm.metadata.name),
        "spec": {
            "replicas": plan.replicas,
            "revisionHistoryLimit": 2,
            "progressDeadlineSeconds": qm.spec.engine.startup_timeout_seconds + 600,
            "selector": {"matchLabels": names.selector(qm)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
            "template": {
                "metadata": {"labels": names.labels(qm, names.SERVER)},
                "spec": {
                    **_pod(qm, plan),
                    "initContainers": [_prepare(qm, plan)],
                    "containers": [_server(qm, plan)],
                    "terminationGracePeriodSeconds": ENDPOINT_REMOVAL_SECONDS
                    + qm.spec.engine.drain_seconds
                    + EXIT_SECONDS,
                },
            },
        },
    }


def plan_job(qm: QuantizedModel, plan: Plan) -> dict[str, Any]:
    """Resolves the model and estimates the cache once. A Job cannot be changed, so its name holds its content."""
    prepare = _prepare(qm, plan)
    # No kernels: what this node would build says nothing of where the model will serve.
    prepare["args"].append("--plan")
    template = {
        "metadata": {"labels": names.labels(qm, names.PLAN)},
        "spec": {
            **_pod(qm, plan),
            "restartPolicy": "Never",
            "containers": [prepare],
        },
    }
    digest = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:7]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": names.metadata(qm, f"{qm.metadata.name}-plan-{digest}", names.PLAN),
        "spec": {"backoffLimit": 2, "template": template},
    }


def _prepare(qm: QuantizedModel, plan: Plan) -> dict[str, Any]:
    """Resolves the model, builds or finds the kernels, and writes what it found as its termination message."""
    prepare = _container(
        qm,
        plan,
        contract.PREPARE_CONTAINER,
        {
            "command": ["manthanquant", "prepare"],
            "args": flags(qm, plan),  # it reads the lengths and the cache's size, and leaves the rest
            "terminationMessagePath": contract.TERMINATION_LOG,
            "terminationMessagePolicy": "File",  # its result must not be replaced by the log's end
        },
    )
    if token := qm.spec.model.token_secret_ref:
        prepare["env"].append({"name": "HF_TOKEN", "valueFrom": _secret(token.name, token.key)})
    return prepare


def _server(qm: QuantizedModel, plan: Plan) -> dict[str, Any]:
    health = {"httpGet": {"path": contract.HEALTH_PATH, "port": contract.HTTP_PORT_NAME}, "timeoutSeconds": 10}
    server = _container(
        qm,
        plan,
        contract.SERVER_CONTAINER,
        {
            "command": ["python", "-m", "manthanquant.serve", "serve", contract.RESOLVED_MODEL_LINK],
            "args": [*flags(qm, plan), *(qm.spec.engine.extra_args or ())],
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "ports": [{"name": contract.HTTP_PORT_NAME, "containerPort": contract.HTTP_PORT, "protocol": "TCP"}],
            "startupProbe": {
                **health,
                "periodSeconds": STARTUP_PERIOD_SECONDS,
                "failureThreshold": -(-qm.spec.engine.startup_timeout_seconds // STARTUP_PERIOD_SECONDS),
            },
            "readinessProbe": {**health, "periodSeconds": 5, "failureThreshold": 3},
            "livenessProbe": {**health, "periodSeconds": 15, "failureThreshold": 8},
            "lifecycle": {"preStop": {"sleep": {"seconds": ENDPOINT_REMOVAL_SECONDS}}},
        },
    )
    server["env"].append({"name": "HF_HUB_OFFLINE", "value": "1"})  # the init container resolved everything
    if key := qm.spec.api_key_secret_ref:
        server["env"].append({"name": "VLLM_API_KEY", "valueFrom": _secret(key.name, key.key)})
    server["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})
    return server


def flags(qm: QuantizedModel, plan: Plan) -> list[str]:
    """The launcher's and vLLM's flags that the spec sets, one item a flag."""
    spec, cache = qm.spec, qm.spec.kv_cache
    values: dict[str, Any] = {
        "--port": contract.HTTP_PORT,
        "--served-model-name": plan.served_name,
        "--kv-format": cache.format,
        "--mode": plan.mode,
        "--recent-tokens": cache.recent_tokens,
        "--sink-tokens": cache.sink_tokens,
        "--kv-cache-memory-bytes": plan.cache_bytes,
        "--max-model-len": spec.engine.max_model_len,
        "--max-num-seqs": plan.max_requests,
        "--gpu-memory-utilization": spec.engine.gpu_memory_utilization,
        "--shutdown-timeout": spec.engine.drain_seconds,
        "--tensor-parallel-size": plan.tensor_parallel_size if plan.tensor_parallel_size > 1 else None,
    }
    return [f"{flag}={value}" for flag, value in values.items() if value is not None]


def _pod(qm: QuantizedModel, plan: Plan) -> dict[str, Any]:
    """What servers and planning pods share: a restricted pod without a token, and its volumes."""
    resources = qm.spec.resources
    optional = {
        "imagePullSecrets": [{"name": name} for name in plan.pull_secrets],
        "nodeSelector": resources.node_selector,
        "tolerations": [_dump(toleration) for toleration in resources.tolerations or ()],
        "affinity": _affinity(resources.min_compute_capability),
        "runtimeClassName": resources.runtime_class_name,
        "priorityClassName": resources.priority_class_name,
    }
    return {
        "serviceAccountName": qm.metadata.name,
        "automountServiceAccountToken": False,
        # A Service named `vllm` would set VLLM_PORT=tcp://..., and vLLM would refuse to start.
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": _volumes(qm, plan),
        **{key: value for key, value in optional.items() if value},
    }


def _container(qm: QuantizedModel, plan: Plan, name: str, own: dict[str, Any]) -> dict[str, Any]:
    """A container of the server image: both have the same devices, environment and volumes."""
    models: dict[str, Any] = {"name": "models", "mountPath": contract.MODEL_DIR}
    if not plan.source.is_remote or name == contract.SERVER_CONTAINER:  # only a download writes there
        models["readOnly"] = True
    mounts = [
        models,
        {"name": "kernels", "mountPath": contract.KERNEL_CACHE_DIR},
        {"name": "work", "mountPath": contract.WORK_DIR},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    if qm.spec.kv_cache.calibration_text_ref:
        mounts.append({"name": "text", "mountPath": TEXT_DIR, "readOnly": True})
    return {
        "name": name,
        "image": plan.image,
        "imagePullPolicy": plan.pull_policy,
        **own,
        "env": _environment(qm, plan),
        "resources": _resources(qm, plan),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }


def _environment(qm: QuantizedModel, plan: Plan) -> list[dict[str, Any]]:
    spec, cache = qm.spec, qm.spec.kv_cache
    values = {
        contract.ENV_MODEL_URI: spec.model.uri,
        contract.ENV_FORMAT: cache.format,
        contract.ENV_MODE: plan.mode,
        contract.ENV_CALIBRATION: cache.calibration,
        contract.ENV_RECENT_TOKENS: str(cache.recent_tokens),
        contract.ENV_SINK_TOKENS: str(cache.sink_tokens),
        contract.ENV_CACHE_DIR: contract.KERNEL_CACHE_DIR,
        "HOME": contract.WORK_DIR,
        "USER": "manthanquant",  # torch asks for the user's name, and the image has no entry for every uid
        "HF_HOME": contract.MODEL_DIR if plan.source.is_remote else f"{contract.WORK_DIR}/huggingface",
        "VLLM_NO_USAGE_STATS": "1",
        **{name: f"{contract.KERNEL_CACHE_DIR}/{folder}" for name, folder in _CACHE_ENV.items()},
    }
    if cache.skip_layers:
        values[contract.ENV_SKIP_LAYERS] = ",".join(map(str, sorted(cache.skip_layers)))
    if text := cache.calibration_text_ref:
        values[contract.ENV_CALIBRATION_TEXT] = f"{TEXT_DIR}/{text.key}"
    env: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in values.items()]
    own = {item["name"] for item in env}
    for variable in spec.engine.env or ():
        if variable.name in own:  # the user's value wins: a list with two entries of one name cannot be applied
            env = [item for item in env if item["name"] != variable.name]
        source = variable.value_from and variable.value_from.secret_key_ref
        env.append(
            {"name": variable.name, "valueFrom": _secret(source.name, source.key)}
            if source
            else {"name": variable.name, "value": variable.value or ""}
        )
    return env


def _secret(name: str, key: str) -> dict[str, Any]:
    return {"secretKeyRef": {"name": name, "key": key}}


def _resources(qm: QuantizedModel, plan: Plan) -> dict[str, Any]:
    """Requests and limits. No CPU limit: throttling stalls the engine's step loop.

    There is always a request: a pod without any is the first to be evicted. On a CPU the cache is memory of the node,
    so it is asked for, even where the user set no memory.
    """
    want = qm.spec.resources
    requests: dict[str, str] = {"cpu": want.cpu or DEFAULT_CPU_REQUEST}
    limits: dict[str, str] = {}
    if want.memory:
        requests["memory"] = limits["memory"] = want.memory
    elif want.accelerator == CPU and plan.cache_bytes:
        requests["memory"] = quantity_of(plan.cache_bytes)
    if want.accelerator != CPU and not qm.spec.plan_only:
        requests[want.accelerator] = limits[want.accelerator] = str(want.count)
    return {"requests": requests, **({"limits": limits} if limits else {})}


def _volumes(qm: QuantizedModel, plan: Plan) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = [
        {"name": "models", **_model_volume(qm, plan)},
        {"name": "kernels", **_kernel_volume(qm)},
        {"name": "work", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    if text := qm.spec.kv_cache.calibration_text_ref:
        volumes.append(
            {"name": "text", "configMap": {"name": text.name, "items": [{"key": text.key, "path": text.key}]}}
        )
    return volumes


def _model_volume(qm: QuantizedModel, plan: Plan) -> dict[str, Any]:
    if plan.source.scheme == "pvc":
        return {"persistentVolumeClaim": {"claimName": plan.source.volume}}
    if plan.source.scheme == "file":
        return {"hostPath": {"path": plan.source.volume, "type": "Directory"}}
    if cache := qm.spec.model.cache:
        return {"persistentVolumeClaim": {"claimName": cache.existing_claim or names.model_claim(qm)}}
    return {"emptyDir": {}}


def _kernel_volume(qm: QuantizedModel) -> dict[str, Any]:
    cache = qm.spec.kernel_cache
    if claim := cache.persistent_volume_claim:
        return {"persistentVolumeClaim": {"claimName": claim.existing_claim or names.kernel_claim(qm)}}
    if cache.empty_dir and cache.empty_dir.size_limit:
        return {"emptyDir": {"sizeLimit": cache.empty_dir.size_limit}}
    return {"emptyDir": {}}


def _affinity(min_compute_capability: str | None) -> dict[str, Any] | None:
    """Nodes whose labels say that the GPU is new enough, and nodes without such labels."""
    if min_compute_capability is None:
        return None
    major, minor = min_compute_capability.split(".")
    label = "nvidia.com/gpu.compute"

    def term(*expressions: tuple[str, str, list[str] | None]) -> dict[str, Any]:
        return {
            "matchExpressions": [
                {"key": f"{label}.{key}", "operator": operator, **({"values": values} if values else {})}
                for key, operator, values in expressions
            ]
        }

    terms = [
        term(("major", "Gt", [major])),
        term(("major", "In", [major]), ("minor", "Gt", [str(int(minor) - 1)])),
        term(("major", "DoesNotExist", None)),
    ]
    if minor == "0":  # `Gt -1` is not a valid expression, and every minor version will do
        terms[1] = term(("major", "In", [major]))
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}


def _dump(toleration: Toleration) -> dict[str, Any]:
    return toleration.model_dump(by_alias=True, exclude_none=True)
