"""Servers' statistics -> `status.kernel`, `status.kvCache` and `status.load`. Pure.

Figures are rounded here, so that a server without traffic gives the same status again and again and nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from manthanquant.contract import CacheReport, CalibrationReport, KernelReport, Stats

from .api import KernelStatus, KVCacheStatus, LoadStatus, PodLoad

MAX_POD_ROWS = 16
Number = TypeVar("Number", int, float)
_UNITS = ("", "Ki", "Mi", "Gi", "Ti", "Pi")


@dataclass(frozen=True)
class Sample:
    """One server's statistics. `tokens_per_second` comes from two samples of one server."""

    pod: str
    stats: Stats
    taken: float  # monotonic seconds
    tokens_per_second: float | None = None


def sample(pod: str, stats: Stats, taken: float, before: Sample | None) -> Sample:
    """A sample, with the rate since the one before. A counter that went back means a restart: no rate yet."""
    rate = None
    new, old = stats.load, before.stats.load if before else None
    if before and new and old and new.generated_tokens is not None and old.generated_tokens is not None:
        tokens, seconds = new.generated_tokens - old.generated_tokens, taken - before.taken
        if tokens >= 0 and seconds > 0:
            rate = tokens / seconds
    return Sample(pod, stats, taken, rate)


def kernel(report: KernelReport, calibration: CalibrationReport | None) -> KernelStatus:
    notes = [text for text in (report.message, calibration and calibration.message) if text]
    return KernelStatus(
        sm_arch=report.arch,
        digest=report.digest,
        source=report.source,
        build_seconds=significant(report.build_seconds),
        transform=calibration.transform if calibration else None,
        calibration=calibration.source if calibration else None,
        message="; ".join(notes) or None,
    )


def estimated(cache: CacheReport, servers: int) -> dict[str, Any]:
    """`status.kvCache` from the init container's estimate of one server."""
    return {**_cache([cache] * servers), "source": "Estimated"}


def measured(samples: Sequence[Sample]) -> dict[str, Any]:
    """`status.kvCache` from the servers' statistics."""
    writes = [item.stats.writes for item in samples]
    cosines = [(c, w.sampled_vectors) for w in writes for c in (w.key_cosine, w.value_cosine) if c is not None]
    weight = sum(count for _, count in cosines)
    return {
        **_cache([item.stats.cache for item in samples]),
        "writes": sum(w.calls for w in writes),
        "vectors_compressed": sum(w.vectors for w in writes),
        "errors": sum(w.errors for w in writes),
        "cosine_similarity": round(sum(c * n for c, n in cosines) / weight, 4) if weight else None,
        "source": "Measured",
    }


def _cache(caches: Sequence[CacheReport]) -> dict[str, Any]:
    first = caches[0]
    saved = _sum(cache.saved_bytes for cache in caches)
    return {
        "format": first.format,
        "mode": first.mode,
        "bits_per_element": significant(first.bits_per_element, 4),
        "bytes_per_token": first.bytes_per_token,
        "compression_ratio": significant(first.compression_ratio, 3),
        "capacity_tokens": _sum(cache.capacity_tokens for cache in caches),
        "capacity_tokens_uncompressed": _sum(cache.capacity_tokens_uncompressed for cache in caches),
        "saved_bytes": saved,
        "saved": None if saved is None else human_bytes(saved),
    }


def stamp(new: Mapping[str, Any], old: KVCacheStatus | None, time: str) -> KVCacheStatus:
    """Adds `measuredAt`: the time at which the figures last changed, so that it changes with them only."""
    status = KVCacheStatus(**new)
    if status.source != "Measured":
        return status
    if old and old.model_copy(update={"measured_at": None}) == status:
        time = old.measured_at or time
    return status.model_copy(update={"measured_at": time})


def load(samples: Sequence[Sample]) -> LoadStatus | None:
    """The servers' load; rows for each only while there are few."""
    rows = [_pod_load(item) for item in sorted(samples, key=lambda s: s.pod) if item.stats.load]
    if not rows:
        return None
    usage = [row.kv_usage_percent for row in rows if row.kv_usage_percent is not None]
    return LoadStatus(
        requests_running=_sum(row.requests_running for row in rows),
        requests_waiting=_sum(row.requests_waiting for row in rows),
        generated_tokens_per_second=significant(_sum(row.generated_tokens_per_second for row in rows)),
        kv_usage_percent=round(sum(usage) / len(usage)) if usage else None,
        preemptions=_sum(row.preemptions for row in rows),
        pods=rows if len(rows) <= MAX_POD_ROWS else None,
    )


def _pod_load(item: Sample) -> PodLoad:
    stats = item.stats.load
    assert stats is not None
    return PodLoad(
        pod=item.pod,
        requests_running=stats.requests_running,
        requests_waiting=stats.requests_waiting,
        generated_tokens_per_second=significant(item.tokens_per_second),
        kv_usage_percent=None if stats.kv_usage is None else round(stats.kv_usage * 100),
        preemptions=stats.preemptions,
    )


def _sum(values: Iterable[Number | None]) -> Number | None:
    """The sum of what was measured; absent when nothing was."""
    present = [value for value in values if value is not None]
    return sum(present[1:], present[0]) if present else None


def significant(value: float | None, digits: int = 2) -> float | None:
    """A figure in so many significant digits."""
    return None if value is None else float(f"{value:.{digits}g}")


def human_bytes(value: int) -> str:
    """Bytes as Kubernetes writes them, to one decimal: 3435973836 -> 3.2Gi."""
    size, unit = float(value), 0
    while abs(size) >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.1f}{_UNITS[unit]}" if unit else str(value)
