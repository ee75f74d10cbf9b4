"""Spec and settings -> what will run: the decisions that need more than the spec's own text."""

from __future__ import annotations

from dataclasses import dataclass

from manthanquant.contract import CPU_MAX_REQUESTS, DEFAULT_MODE
from manthanquant.formats import ENGINE_FORMATS, SEED3

from . import source
from .api import CPU, QuantizedModel
from .errors import SpecError
from .quantity import bytes_of
from .settings import Settings

# On a CPU vLLM would take 92% of the node's memory, whatever the pod may use: a server says how much it takes.
CPU_CACHE_BYTES = 4 << 30


@dataclass(frozen=True)
class Plan:
    """What a server runs with, every default filled in."""

    source: source.Source
    mode: str
    image: str
    pull_policy: str
    pull_secrets: tuple[str, ...]
    served_name: str
    tensor_parallel_size: int
    replicas: int
    cache_bytes: int | None  # None: what the engine finds free on its GPUs
    max_requests: int | None  # at once; None: the engine's own default

    @property
    def summary(self) -> str:
        return f"mode {self.mode}, image {self.image}"


def make(qm: QuantizedModel, settings: Settings) -> Plan:
    """Fills in the defaults. Raises `SpecError` for what the API server let through but cannot be served here."""
    spec = qm.spec
    mode = spec.kv_cache.mode or default_mode(spec.kv_cache.format)
    image = spec.engine.image or settings.images.server(spec.resources.accelerator)
    if not image:
        raise SpecError(
            "spec.engine.image",
            f"the operator has no image for accelerator {spec.resources.accelerator}",
            "set it, or ask the admin to set the chart's value images",
            "NoImage",
        )
    return Plan(
        source=source.parse(spec.model.uri, settings.allowed_host_paths),
        mode=mode,
        image=image,
        pull_policy=spec.engine.image_pull_policy or settings.images.pull_policy,
        pull_secrets=tuple(dict.fromkeys((*settings.images.pull_secrets, *(spec.engine.image_pull_secrets or ())))),
        served_name=spec.engine.served_model_name or qm.metadata.name,
        tensor_parallel_size=1 if spec.resources.accelerator == CPU else spec.resources.count,
        replicas=0 if spec.suspend or spec.plan_only else spec.replicas,
        cache_bytes=_cache_bytes(qm),
        max_requests=spec.engine.max_num_seqs or _default_max_requests(qm, mode),
    )


def _cache_bytes(qm: QuantizedModel) -> int | None:
    """What the user gave; on a CPU else a few GiB, and at most half of the memory that the user gave the pod."""
    if memory := qm.spec.kv_cache.memory:
        return bytes_of(memory)
    if qm.spec.resources.accelerator != CPU:
        return None
    limit = qm.spec.resources.memory
    return min(CPU_CACHE_BYTES, bytes_of(limit) // 2) if limit else CPU_CACHE_BYTES


def _default_max_requests(qm: QuantizedModel, mode: str) -> int | None:
    on_cpu = qm.spec.resources.accelerator == CPU
    return CPU_MAX_REQUESTS if on_cpu and mode == "compressed" else None


def default_mode(format_name: str) -> str:
    """What a format can do: the engine's own caches need nothing of ours, and the seed's has no pages."""
    if format_name in ENGINE_FORMATS:
        return "off"
    return "shadow" if format_name == SEED3.name else DEFAULT_MODE
