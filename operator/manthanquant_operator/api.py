"""The `QuantizedModel` resource: the one definition of its spec and status.

`crd.py` generates the CustomResourceDefinition from these models, the API server enforces it, and the operator parses
what it reads with the same models. A rule that spans fields is a CEL expression beside the fields that it binds; the
API server checks it, and its message says what to change.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema
from pydantic.alias_generators import to_camel

from manthanquant.contract import CPU_MAX_REQUESTS, DEFAULT_RECENT_TOKENS, DEFAULT_SINK_TOKENS
from manthanquant.formats import DEFAULT_FORMAT, ENGINE_FORMATS, FORMAT_NAMES, PAGED_FORMATS, SEED3

CPU = "cpu"
NVIDIA_GPU = "nvidia.com/gpu"
MAX_NAME_LENGTH = 50  # children append up to 13 characters, and a Service's name has at most 63

_QUANTITY_PATTERN = r"^([0-9]+|[0-9]*\.[0-9]+)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$"

Quantity = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if isinstance(value, (int, float)) else value),
    StringConstraints(pattern=_QUANTITY_PATTERN),
    WithJsonSchema(
        {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "pattern": _QUANTITY_PATTERN,
            "maxLength": 32,
            "x-kubernetes-int-or-string": True,
        }
    ),
]
IntOrPercent = Annotated[
    int | str,
    WithJsonSchema(
        {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "pattern": r"^(100|[0-9]{1,2})%$",
            "maxLength": 4,
            "x-kubernetes-int-or-string": True,
        }
    ),
]
ObjectName = Annotated[
    str, StringConstraints(min_length=1, max_length=253, pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$")
]
LabelValue = Annotated[str, StringConstraints(max_length=63)]
ComputeCapability = Annotated[str, StringConstraints(max_length=5, pattern=r"^[0-9]{1,2}\.[0-9]$")]
Text = Annotated[str, StringConstraints(max_length=1024)]


def rule(expression: str, message: str, **extra: str) -> dict[str, str]:
    """One CEL rule. The message is all that a user sees, so it says what to change."""
    return {"rule": expression, "message": message, **extra}


def rules(*items: dict[str, str]) -> dict[str, Any]:
    return {"x-kubernetes-validations": list(items)}


class Resource(BaseModel):
    """Base of every part: camelCase on the wire; unknown fields are pruned by the API server and ignored here."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)


class SecretKeyRef(Resource):
    """One key of a Secret in the same namespace."""

    name: ObjectName = Field(description="Name of the Secret.")
    key: Annotated[str, StringConstraints(min_length=1, max_length=253)] = Field(description="Key in the Secret.")


class ConfigMapKeyRef(Resource):
    """One key of a ConfigMap in the same namespace."""

    name: ObjectName = Field(description="Name of the ConfigMap.")
    key: Annotated[str, StringConstraints(min_length=1, max_length=253)] = Field(description="Key in the ConfigMap.")


class Claim(Resource):
    """A PersistentVolumeClaim: an existing one, or one that is created and deleted with the resource."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "has(self.existingClaim) != has(self.size)",
                "give exactly one of existingClaim (a claim you made) and size (a claim made for this model)",
            ),
            rule(
                "!has(self.existingClaim) || !has(self.storageClassName)",
                "storageClassName applies to a new claim: remove it, or replace existingClaim by size",
            ),
            rule(
                "!has(oldSelf.size) || !has(self.size) || string(self.size) == string(oldSelf.size)",
                "size cannot be changed: resize the PersistentVolumeClaim itself, or make a new resource",
            ),
        )
    )

    existing_claim: ObjectName | None = Field(default=None, description="Name of an existing PersistentVolumeClaim.")
    size: Quantity | None = Field(default=None, description="Size of a new claim, e.g. 50Gi.")
    storage_class_name: ObjectName | None = Field(
        default=None, description="StorageClass of a new claim; the cluster's default when absent."
    )
    access_mode: Literal["ReadWriteOnce", "ReadWriteMany"] = Field(
        default="ReadWriteOnce", description="ReadWriteMany lets replicas on several nodes share the claim."
    )


class ModelSpec(Resource):
    """Where the weights come from."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "has(self.cache) && has(self.cache.size) && has(oldSelf.cache) && has(oldSelf.cache.size)"
                " ? self.uri == oldSelf.uri : true",
                "uri cannot be changed while the model has a cache of its own: make a new QuantizedModel,"
                " or use cache.existingClaim",
            ),
            rule(
                "!has(self.cache) || self.uri.startsWith('hf://')",
                "cache is for hf:// models; a pvc:// or file:// model is read where it lies: remove cache",
            ),
            rule(
                "!has(self.tokenSecretRef) || self.uri.startsWith('hf://')",
                "tokenSecretRef is for hf:// models: remove it",
            ),
        )
    )

    uri: Annotated[str, StringConstraints(min_length=1, max_length=512)] = Field(
        description="hf://org/name[@revision], pvc://claim/path, or file:///path on a node that the admin allowed.",
        json_schema_extra=rules(
            rule(
                "self.matches('^(hf|pvc|file|oci|s3)://')",
                "uri must start with hf://, pvc:// or file://, e.g. hf://Qwen/Qwen3-8B",
            ),
            rule(
                "!self.matches('^(oci|s3)://')",
                "oci:// and s3:// are not supported yet: copy the model to a claim and use pvc://claim/path",
            ),
            rule(
                r"!self.startsWith('hf://')"
                r" || self.matches('^hf://[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9._/-]+)?$')",
                "an hf:// uri is hf://org/name or hf://org/name@revision",
            ),
            rule(
                r"!self.startsWith('pvc://') || self.matches('^pvc://[a-z0-9]([a-z0-9.-]*[a-z0-9])?(/.*)?$')",
                "a pvc:// uri is pvc://claim/path, with the claim's name in lower case",
            ),
            rule(
                "!self.startsWith('file://') || self.matches('^file:///[^/]')",
                "a file:// uri is an absolute path: file:///path/to/model, three slashes",
            ),
            rule(
                r"!self.matches('(^|/)[.][.](/|$)')",
                "uri must not hold '..': write the path without it",
            ),
        ),
    )
    token_secret_ref: SecretKeyRef | None = Field(default=None, description="Hugging Face token, for gated models.")
    cache: Claim | None = Field(
        default=None, description="Where an hf:// model is kept between restarts; the pod's own disk when absent."
    )


_ENGINE_CEL = "[" + ", ".join(f"'{name}'" for name in ENGINE_FORMATS) + "]"


class KVCacheSpec(Resource):
    """The format of the KV cache, and the tiers around it."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                f"self.format != '{SEED3.name}' || !has(self.mode) || self.mode == 'shadow'",
                f"format {SEED3.name} has no pages and serves mode shadow only: set mode to shadow,"
                f" or use {DEFAULT_FORMAT}",
            ),
            rule(
                f"!(self.format in {_ENGINE_CEL}) || !has(self.mode) || self.mode == 'off'",
                f"formats {' and '.join(ENGINE_FORMATS)} are the engine's own caches: remove mode or set it to off,"
                f" or use {DEFAULT_FORMAT}",
            ),
            rule(
                "!has(self.calibrationTextRef) || self.calibration != 'off'",
                "calibrationTextRef needs a calibration: remove it, or set calibration to auto",
            ),
            rule(
                f"!has(self.skipLayers) || !(self.format in {_ENGINE_CEL})",
                "skipLayers needs a compressed format: remove it, or use " + DEFAULT_FORMAT,
            ),
        )
    )

    format: Annotated[str, WithJsonSchema({"type": "string", "enum": list(FORMAT_NAMES)})] = Field(
        default=DEFAULT_FORMAT,
        description=f"mq3 is k42v3 and mq4 is k4v4. Paged: {', '.join(PAGED_FORMATS)}. {SEED3.name} serves mode shadow;"
        " bf16 and fp8 are the engine's own.",
    )
    mode: Literal["compressed", "shadow", "off"] | None = Field(
        default=None,
        description="compressed: pages hold codes. shadow: the engine's cache serves, each write is also compressed"
        " and measured. off: the engine's cache alone. Default: what the format can do.",
    )
    calibration: Literal["auto", "gain", "dense", "off"] = Field(
        default="auto",
        description="auto: transforms from a short text before serving, kept in kernelCache. gain, dense: of this kind;"
        " dense has less error, gain costs a GPU less time. off: Hadamard, with far more error.",
    )
    calibration_text_ref: ConfigMapKeyRef | None = Field(
        default=None, description="Text to calibrate on, like what will be served; a built-in text when absent."
    )
    skip_layers: Annotated[list[Annotated[int, Field(ge=0, le=1023)]], Field(max_length=256)] | None = Field(
        default=None,
        description="Layers kept in the engine's own format.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    sink_tokens: int = Field(default=DEFAULT_SINK_TOKENS, ge=0, le=1024, description="First tokens that stay exact.")
    recent_tokens: int = Field(
        default=DEFAULT_RECENT_TOKENS, ge=0, le=65536, description="Newest tokens that stay exact."
    )
    memory: Quantity | None = Field(
        default=None,
        description="Bytes of KV cache a server (--kv-cache-memory-bytes), e.g. 1Gi. Replaces"
        " engine.gpuMemoryUtilization. Default for accelerator cpu: 4Gi, and at most half of resources.memory.",
        json_schema_extra=rules(
            rule(
                "quantity(string(self)).compareTo(quantity('1Mi')) >= 0",
                "memory is a size in bytes of at least 1Mi, e.g. 1Gi",
            )
        ),
    )


class EnvVarSource(Resource):
    """Where an environment variable's value comes from."""

    secret_key_ref: SecretKeyRef


class EnvVar(Resource):
    """An environment variable of the server and of the init container."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("has(self.value) != has(self.valueFrom)", "give exactly one of value and valueFrom"),
            rule(
                "!self.name.startsWith('MANTHANQUANT_')",
                "MANTHANQUANT_ variables belong to the operator: use the fields of kvCache and engine",
            ),
        )
    )

    name: Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    value: Text | None = None
    value_from: EnvVarSource | None = None


# Flags that a field sets, and the field: repeating one in extraArgs would silently override it.
OWNED_FLAGS = {
    "--model": "model.uri",
    "--port": "service.port",
    "--host": "service.port",
    "--kv-format": "kvCache.format",
    "--kv-cache-dtype": "kvCache.format",
    "--mode": "kvCache.mode",
    "--recent-tokens": "kvCache.recentTokens",
    "--sink-tokens": "kvCache.sinkTokens",
    "--kv-cache-memory-bytes": "kvCache.memory",
    "--max-model-len": "engine.maxModelLen",
    "--max-num-seqs": "engine.maxNumSeqs",
    "--gpu-memory-utilization": "engine.gpuMemoryUtilization",
    "--tensor-parallel-size": "engine.tensorParallelSize",
    "--served-model-name": "engine.servedModelName",
    "--shutdown-timeout": "engine.drainSeconds",
    "--api-key": "apiKeySecretRef",
}


class EngineSpec(Resource):
    """vLLM's settings."""

    max_model_len: int | None = Field(default=None, ge=1, le=10_000_000, description="Longest context in tokens.")
    max_num_seqs: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="Most requests in one step; the exact tier has room for them. Default: vLLM's own, but"
        f" {CPU_MAX_REQUESTS} for a compressed cache on accelerator cpu.",
    )
    gpu_memory_utilization: float | None = Field(
        default=None,
        ge=0.05,
        le=1.0,
        description="Share of a GPU's memory for weights and KV cache.",
    )
    tensor_parallel_size: int | None = Field(
        default=None, ge=1, le=64, description="GPUs a server spreads over; resources.count when absent."
    )
    served_model_name: Annotated[str, StringConstraints(min_length=1, max_length=253)] | None = Field(
        default=None, description="Name in the OpenAI API; the resource's name when absent."
    )
    extra_args: Annotated[list[Text], Field(max_length=64)] | None = Field(
        default=None,
        description="More flags of vLLM, each as one item: --flag=value.",
        json_schema_extra={
            "x-kubernetes-list-type": "atomic",
            **rules(
                *(
                    rule(
                        f"self.all(arg, arg != '{flag}' && !arg.startsWith('{flag}='))",
                        f"{flag} is set by spec.{field}: remove it from extraArgs",
                    )
                    for flag, field in OWNED_FLAGS.items()
                ),
                rule(
                    "self.all(arg, !arg.startsWith('-') || arg.startsWith('--') && !arg.contains(' '))",
                    "each item of extraArgs is one argument: write --flag=value, without spaces before the value",
                ),
            ),
        },
    )
    env: Annotated[list[EnvVar], Field(max_length=64)] | None = Field(
        default=None,
        description="More environment variables.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    image: Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=r"^\S+$")] | None = Field(
        default=None, description="Server image; the operator's image for the accelerator when absent."
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        default=None, description="The operator's setting when absent."
    )
    image_pull_secrets: Annotated[list[ObjectName], Field(max_length=16)] | None = Field(
        default=None,
        description="Names of Secrets for the registry, besides the operator's.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    startup_timeout_seconds: int = Field(
        default=3600, ge=60, le=86400, description="How long the server may take to load before it is restarted."
    )
    drain_seconds: int = Field(
        default=60, ge=0, le=3600, description="How long running requests may finish after a stop."
    )


class Toleration(Resource):
    """As in a pod."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.operator) || self.operator != 'Exists' || !has(self.value)",
                "operator Exists takes no value: remove value, or use operator Equal",
            )
        )
    )

    key: Annotated[str, StringConstraints(max_length=316)] | None = None
    operator: Literal["Equal", "Exists"] | None = None
    value: LabelValue | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    toleration_seconds: int | None = Field(default=None, ge=0, le=86400)


class ResourcesSpec(Resource):
    """What a server's pod takes of a node."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                f"self.accelerator != '{CPU}' || self.count == 1",
                "count is a number of accelerators: remove it for accelerator cpu, and use cpu for cores",
            ),
            rule(
                f"self.accelerator != '{CPU}' || !has(self.minComputeCapability)",
                "minComputeCapability is for GPUs: remove it for accelerator cpu",
            ),
        )
    )

    accelerator: Annotated[
        str, StringConstraints(max_length=63, pattern=r"^(cpu|nvidia\.com/[a-z0-9]([a-z0-9.-]*[a-z0-9])?)$")
    ] = Field(
        default=NVIDIA_GPU, description="Extended resource of the GPU (nvidia.com/gpu, or a MIG profile), or cpu."
    )
    count: int = Field(default=1, ge=1, le=64, description="Accelerators a server.")
    cpu: Quantity | None = Field(
        default=None, description="CPU request, in cores; 500m when absent. There is no limit."
    )
    memory: Quantity | None = Field(
        default=None,
        description="Memory request and limit, e.g. 16Gi. When absent there is no limit, and accelerator cpu requests"
        " as much as its KV cache takes.",
    )
    min_compute_capability: ComputeCapability | None = Field(
        default=None,
        description="Oldest GPU that may serve, e.g. 8.0; uses the labels of GPU feature discovery where present.",
    )
    node_selector: Annotated[dict[str, LabelValue], Field(max_length=32)] | None = None
    tolerations: Annotated[list[Toleration], Field(max_length=32)] | None = Field(
        default=None, json_schema_extra={"x-kubernetes-list-type": "atomic"}
    )
    runtime_class_name: ObjectName | None = None
    priority_class_name: ObjectName | None = None


class EmptyDir(Resource):
    """A directory that lives as long as its pod."""

    size_limit: Quantity | None = None


class KernelCacheSpec(Resource):
    """Where compiled kernels, calibrations and vLLM's compile caches are kept. A claim survives restarts."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!(has(self.emptyDir) && has(self.persistentVolumeClaim))",
                "give one of emptyDir and persistentVolumeClaim, not both",
            )
        )
    )

    empty_dir: EmptyDir | None = None
    persistent_volume_claim: Claim | None = None


class AutoscalingSpec(Resource):
    """A HorizontalPodAutoscaler on this resource's /scale."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("self.minReplicas <= self.maxReplicas", "minReplicas must not exceed maxReplicas"),
            rule(
                "self.metric != 'cpu' || string(self.target).matches('^[1-9][0-9]{0,2}$')",
                "target of metric cpu is a percentage of the CPU request, 1 to 999, e.g. 80",
            ),
        )
    )

    min_replicas: int = Field(default=1, ge=1, le=1000)
    max_replicas: int = Field(ge=1, le=1000)
    metric: Annotated[str, StringConstraints(min_length=1, max_length=253)] = Field(
        default="cpu", description="cpu (percent of the request), or a pods metric of the cluster's metrics adapter."
    )
    target: Quantity = Field(description="Average a pod: percent for cpu, else the metric's own unit.")


class DisruptionSpec(Resource):
    """Limits on voluntary evictions, such as node drains."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!(has(self.minAvailable) && has(self.maxUnavailable))",
                "give one of minAvailable and maxUnavailable, not both",
            )
        )
    )

    min_available: IntOrPercent | None = None
    max_unavailable: IntOrPercent | None = None


class ServiceSpec(Resource):
    """The Service in front of the servers."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    port: int = Field(default=8000, ge=1, le=65535)
    annotations: Annotated[dict[str, Text], Field(max_length=32)] | None = None


class NetworkPolicySpec(Resource):
    """Who may reach the servers, where the cluster's network enforces it."""

    enabled: bool = Field(
        default=False, description="Allow only pods of this namespace, of allowedNamespaces and the operator."
    )
    allowed_namespaces: Annotated[list[ObjectName], Field(max_length=64)] | None = Field(
        default=None, json_schema_extra={"x-kubernetes-list-type": "set"}
    )


class QuantizedModelSpec(Resource):
    """A model to serve on a compressed KV cache."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                f"!has(self.engine.tensorParallelSize) || self.resources.accelerator == '{CPU}'"
                " || self.engine.tensorParallelSize == self.resources.count",
                "engine.tensorParallelSize must equal resources.count: remove it, or set both to the same number",
            ),
            rule(
                f"self.resources.accelerator != '{CPU}' || !has(self.engine.tensorParallelSize)"
                " || self.engine.tensorParallelSize == 1",
                "engine.tensorParallelSize must be 1 for accelerator cpu: remove it",
            ),
            rule(
                f"self.resources.accelerator != '{CPU}' || !has(self.engine.gpuMemoryUtilization)",
                "engine.gpuMemoryUtilization is for GPUs: remove it and set kvCache.memory for accelerator cpu",
            ),
            rule(
                "!has(self.kvCache.memory) || !has(self.engine.gpuMemoryUtilization)",
                "give one of kvCache.memory and engine.gpuMemoryUtilization, not both",
            ),
            rule(
                f"self.resources.accelerator != '{CPU}' || self.kvCache.format != 'fp8'",
                f"kvCache.format fp8 needs a GPU: use {DEFAULT_FORMAT} or bf16 for accelerator cpu",
            ),
            rule(
                "!has(self.kernelCache.persistentVolumeClaim) || self.replicas <= 1 && !has(self.autoscaling)"
                " || has(self.kernelCache.persistentVolumeClaim.existingClaim)"
                " || self.kernelCache.persistentVolumeClaim.accessMode == 'ReadWriteMany'",
                "several replicas share kernelCache.persistentVolumeClaim: set its accessMode to ReadWriteMany,"
                " or use emptyDir",
            ),
            rule(
                "!has(self.model.cache) || self.replicas <= 1 && !has(self.autoscaling)"
                " || has(self.model.cache.existingClaim) || self.model.cache.accessMode == 'ReadWriteMany'",
                "several replicas share model.cache: set its accessMode to ReadWriteMany",
            ),
        )
    )

    model: ModelSpec
    kv_cache: KVCacheSpec = KVCacheSpec()
    engine: EngineSpec = EngineSpec()
    resources: ResourcesSpec = ResourcesSpec()
    kernel_cache: KernelCacheSpec = KernelCacheSpec()
    replicas: int = Field(
        default=1, ge=0, le=1000, description="Servers. An autoscaler sets it when autoscaling is given."
    )
    autoscaling: AutoscalingSpec | None = None
    disruption: DisruptionSpec = DisruptionSpec()
    service: ServiceSpec = ServiceSpec()
    network_policy: NetworkPolicySpec = NetworkPolicySpec()
    api_key_secret_ref: SecretKeyRef | None = Field(default=None, description="Key that clients of the API must send.")
    suspend: bool = Field(default=False, description="Stop the servers, keep the claims and the Service.")
    plan_only: bool = Field(
        default=False, description="Resolve the model and estimate the cache in a Job, without starting a server."
    )


# -- status --------------------------------------------------------------------------------------------------------

ConditionType = Literal["Planned", "ModelReady", "KernelReady", "WorkloadReady", "TelemetryAvailable", "Ready"]


class Condition(Resource):
    """metav1.Condition. `last_transition_time` moves only when `status` changes."""

    type: ConditionType
    status: Literal["True", "False", "Unknown"]
    reason: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    message: Annotated[str, StringConstraints(max_length=32768)] = ""
    last_transition_time: Annotated[str, WithJsonSchema({"type": "string", "format": "date-time"})]
    observed_generation: int | None = None


class KernelStatus(Resource):
    """The kernels that serve."""

    sm_arch: str | None = Field(default=None, description="e.g. sm_90a, cpu-avx512, or torch for the PyTorch path.")
    digest: str | None = Field(default=None, description="Key of the compiled kernels in the cache.")
    source: str | None = Field(default=None, description="Built, Cached or Prebuilt.")
    build_seconds: float | None = None
    transform: str | None = Field(default=None, description="Key transform: hadamard, gain, dense or none.")
    calibration: str | None = Field(default=None, description="Calibrated, Cached, Off, Failed or NotApplicable.")
    message: str | None = Field(default=None, description="Why a slower path was taken, when it was.")


class KVCacheStatus(Resource):
    """The KV cache, summed over the servers where it is a count. What was not measured is absent, never 0."""

    format: str | None = None
    mode: str | None = None
    bits_per_element: float | None = None
    bytes_per_token: int | None = None
    compression_ratio: float | None = Field(
        default=None, description="Tokens in the same bytes, against the engine's dtype."
    )
    capacity_tokens: int | None = Field(default=None, description="Tokens that fit, summed over the servers.")
    capacity_tokens_uncompressed: int | None = Field(
        default=None, description="In the same bytes, in the engine's dtype."
    )
    saved_bytes: int | None = Field(default=None, description="Bytes that the same tokens would take on top.")
    saved: str | None = Field(default=None, description="savedBytes for people, e.g. 3.1Gi.")
    writes: int | None = Field(default=None, description="Cache write calls since the servers started.")
    vectors_compressed: int | None = None
    errors: int | None = Field(default=None, description="Vectors that held NaN or infinity, stored as zero.")
    cosine_similarity: float | None = Field(default=None, description="Mean over sampled keys and values.")
    source: Literal["Estimated", "Measured"] | None = None
    measured_at: str | None = Field(default=None, description="When these figures last changed.")


class PodLoad(Resource):
    """One server's load."""

    pod: str
    requests_running: int | None = None
    requests_waiting: int | None = None
    generated_tokens_per_second: float | None = None
    kv_usage_percent: int | None = None
    preemptions: int | None = None


class LoadStatus(Resource):
    """The servers' load, in figures rounded so that an idle server writes nothing."""

    requests_running: int | None = None
    requests_waiting: int | None = None
    generated_tokens_per_second: float | None = None
    kv_usage_percent: int | None = Field(default=None, description="Mean over the servers.")
    preemptions: int | None = None
    pods: list[PodLoad] | None = Field(
        default=None,
        description="One row a server, for up to 16 servers.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["pod"]},
    )


class QuantizedModelStatus(Resource):
    """What the operator saw. Everything that was not measured is absent."""

    observed_generation: int | None = None
    replicas: int | None = None
    ready_replicas: int | None = None
    selector: str | None = Field(default=None, description="Label selector of the servers, for /scale.")
    endpoint: str | None = Field(default=None, description="Base URL of the OpenAI API inside the cluster.")
    conditions: list[Condition] | None = Field(
        default=None, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    )
    kernel: KernelStatus | None = None
    kv_cache: KVCacheStatus | None = None
    load: LoadStatus | None = None


class ObjectMeta(Resource):
    """The parts of metadata that the operator reads."""

    name: str
    namespace: str
    uid: str
    generation: int = 1
    deletion_timestamp: str | None = None


class QuantizedModel(Resource):
    """A model served by vLLM on a compressed KV cache."""

    metadata: ObjectMeta
    spec: QuantizedModelSpec
    status: QuantizedModelStatus = QuantizedModelStatus()
