"""Whether a model fits its GPUs: weights and cache against the memory that the nodes' labels show. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from manthanquant.contract import PrepareReport

from . import names
from .api import QuantizedModel
from .telemetry import human_bytes

ENGINE_UTILIZATION = 0.92  # vLLM's own default of --gpu-memory-utilization


@dataclass(frozen=True)
class Fit:
    """`fits` is None where it is not known; `message` says what was compared, and the remedy where it does not fit."""

    fits: bool | None
    message: str


def check(qm: QuantizedModel, report: PrepareReport, gpu_bytes: int | None) -> Fit:
    """Compares what one server needs with its GPUs of `gpu_bytes` each (None: not known).

    Activations and the engine's graphs come on top and are not known before it runs: a close fit may still fail.
    """
    cache = report.cache
    if gpu_bytes is None or report.model_bytes is None or cache is None or not cache.bytes_per_token:
        label = names.gpu_memory_label(qm)
        return Fit(None, f"whether it fits is not known: no node that the operator may read has the label {label}")
    share = qm.spec.engine.gpu_memory_utilization or ENGINE_UTILIZATION
    count = qm.spec.resources.count
    budget = int(gpu_bytes * count * share)
    memory = f"{human_bytes(budget)} of GPU memory ({count} x {human_bytes(gpu_bytes)}, of which {share:.0%})"
    weights = f"weights of {human_bytes(report.model_bytes)}"
    if cache.cache_bytes is not None:
        needs = f"{weights} and a KV cache of {human_bytes(cache.cache_bytes)}"
        if report.model_bytes + cache.cache_bytes > budget:
            remedy = "lower spec.kvCache.memory or raise spec.resources.count"
            return Fit(False, f"{needs} do not fit in {memory}: {remedy}")
        return Fit(True, f"{needs} fit in {memory}")
    tokens = (budget - report.model_bytes - (cache.hot_pool_bytes or 0)) // cache.bytes_per_token
    if tokens <= 0:
        return Fit(False, f"{weights} leave no KV cache in {memory}: raise spec.resources.count")
    return Fit(True, f"beside {weights}, about {tokens:,} tokens fit in {memory}")
