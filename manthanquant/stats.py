"""Counters of one worker, and their sum as the server's `contract.Stats`.

A worker counts every write and measures some (the first of each layer always): what it stored is read back and compared
with what it was given. The API process adds up its workers' snapshots.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from manthanquant import contract
from manthanquant.capacity import with_pages

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
SAMPLE_EVERY = 509  # writes of all layers; a prime, so that the sampled layer moves on
SHADOW_SAMPLE_EVERY = 16  # writes of a layer; measuring is what the shadow is for
SAMPLE_TOKENS = 16  # at most this many tokens of a sampled write


@dataclass
class WriteCounters:
    """Sums over the writes of one worker. A vector is one token's K or V of one head in one layer."""

    calls: int = 0
    vectors: int = 0
    bytes_uncompressed: int = 0
    bytes_compressed: int = 0
    errors: int = 0
    sampled_keys: int = 0
    sampled_values: int = 0
    key_cosine_sum: float = 0.0
    value_cosine_sum: float = 0.0
    squared_error: float = 0.0
    squares: float = 0.0

    def add_write(self, tokens: int, kv_heads: int, exact_bytes: int, coded_bytes: int, errors: int) -> None:
        """One call: `tokens` tokens of one layer; bytes are those of a K+V pair of one head."""
        self.calls += 1
        self.vectors += 2 * tokens * kv_heads
        self.bytes_uncompressed += tokens * kv_heads * exact_bytes
        self.bytes_compressed += tokens * kv_heads * coded_bytes
        self.errors += errors

    def add_sample(self, key: Tensor, stored_key: Tensor, value: Tensor, stored_value: Tensor) -> None:
        """Exact and stored vectors, all `[T, KV heads, D]`. Vectors that are not finite are left out."""
        for name, exact, stored in (("key", key, stored_key), ("value", value, stored_value)):
            exact, stored = exact.float(), stored.float()
            finite = exact.isfinite().all(-1)
            exact, stored = exact[finite], stored[finite]
            norms = (exact.norm(dim=-1) * stored.norm(dim=-1)).clamp_min(1e-30)
            cosine = float(((exact * stored).sum(-1) / norms).sum())
            if name == "key":
                self.key_cosine_sum += cosine
                self.sampled_keys += exact.shape[0]
            else:
                self.value_cosine_sum += cosine
                self.sampled_values += exact.shape[0]
            self.squared_error += float((exact - stored).square().sum())
            self.squares += float(exact.square().sum())

    def report(self) -> contract.WriteStats:
        """The counters as the contract has them; what was never sampled is None."""
        return contract.WriteStats(
            self.calls,
            self.vectors,
            self.bytes_uncompressed,
            self.bytes_compressed,
            self.errors,
            self.sampled_keys + self.sampled_values,
            self.key_cosine_sum / self.sampled_keys if self.sampled_keys else None,
            self.value_cosine_sum / self.sampled_values if self.sampled_values else None,
            self.squared_error / self.squares if self.squares else None,
        )


@dataclass
class WorkerSnapshot:
    """What one worker tells the API process; a plain dict on the wire (`to_wire`, `from_wire`)."""

    writes: WriteCounters = field(default_factory=WriteCounters)
    hot: contract.HotStats | None = None
    kernel: contract.KernelReport = field(default_factory=lambda: contract.KernelReport("torch"))
    calibration: contract.CalibrationReport = field(default_factory=lambda: contract.CalibrationReport("none", "Off"))
    page_bytes: int = 0  # of all pages of all layers
    hot_pool_bytes: int = 0
    bytes_per_token: int = 0
    bytes_per_token_uncompressed: int = 0

    def to_wire(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> WorkerSnapshot:
        return cls(
            **data
            | {
                "writes": WriteCounters(**data["writes"]),
                "hot": data["hot"] and contract.HotStats(**data["hot"]),
                "kernel": contract.KernelReport(**data["kernel"]),
                "calibration": contract.CalibrationReport(**data["calibration"]),
            }
        )


def _summed(kind: type[T], parts: Iterable[T]) -> T:
    rows = [dataclasses.astuple(part) for part in parts]  # type: ignore[call-overload]
    return kind(*(sum(column) for column in zip(*rows)))


def combine(
    workers: Sequence[WorkerSnapshot],
    *,
    model: str,
    format: str,
    mode: str,
    uptime_seconds: float,
    capacity_tokens: int | None,
    load: contract.LoadStats | None,
) -> contract.Stats:
    """The server's statistics: sums over workers (tensor-parallel ranks each hold their own heads).

    Kernel and calibration are those of the first worker: all of them run on one node from one file.
    `capacity_tokens` is the engine allocator's own figure.
    """
    writes = _summed(WriteCounters, (w.writes for w in workers))
    hot = [w.hot for w in workers if w.hot is not None]
    ours, engine, pages, pool = (
        sum(getattr(w, name) for w in workers)
        for name in ("bytes_per_token", "bytes_per_token_uncompressed", "page_bytes", "hot_pool_bytes")
    )
    cache = contract.CacheReport(
        format=format,
        mode=mode,
        bits_per_element=round(16 * ours / engine, 3) if engine else None,
        bytes_per_token=ours or None,
        bytes_per_token_uncompressed=engine or None,
        compression_ratio=round(engine / ours, 3) if ours else None,
        hot_pool_bytes=pool,
    )
    if capacity_tokens and engine:
        cache = with_pages(cache, pages, capacity_tokens)
    return contract.Stats(
        model=model,
        kernel=workers[0].kernel,
        calibration=workers[0].calibration,
        cache=cache,
        uptime_seconds=round(uptime_seconds, 1),
        writes=writes.report(),
        hot=_summed(contract.HotStats, hot) if hot else None,
        load=load,
    )


def line(stats: contract.Stats) -> str:
    """The statistics line on the log: calls, vectors, measured ratio and bytes saved by the writes so far."""
    writes = stats.writes
    parts = [f"calls={writes.calls}", f"compressed={writes.vectors}"]
    if writes.bytes_compressed:
        parts.append(f"ratio={writes.bytes_uncompressed / writes.bytes_compressed:.2f}x")
        parts.append(f"saved={(writes.bytes_uncompressed - writes.bytes_compressed) / 1e6:.2f}MB")
    if writes.key_cosine is not None and writes.value_cosine is not None:
        parts.append(f"cosine={writes.key_cosine:.4f}/{writes.value_cosine:.4f}")
    if writes.relative_mse is not None:
        parts.append(f"mse={writes.relative_mse:.5f}")
    return " ".join([f"[ManthanQuant pid={os.getpid()}]", *parts, f"errors={writes.errors}"])


class Sample(NamedTuple):
    """One figure of /metrics. A counter's exported name ends in `_total`, which the client library adds."""

    name: str
    help: str
    value: float
    is_counter: bool


_COUNTERS = {
    "writes.calls": "calls of the cache write, one a layer and step",
    "writes.vectors": "vectors compressed: one token's K or V of one head in one layer",
    "writes.bytes_uncompressed": "bytes of those vectors as the model made them",
    "writes.bytes_compressed": "bytes of those vectors in the format",
    "writes.errors": "vectors that held NaN or infinity and were stored as zero",
    "hot.evictions_in_window": "exact copies evicted while their request still read them",
}
_GAUGES = {
    "writes.key_cosine": "mean cosine similarity of stored keys, sampled",
    "writes.value_cosine": "mean cosine similarity of stored values, sampled",
    "writes.relative_mse": "squared error of stored vectors over their squares, sampled",
    "hot.pages": "slots of the exact tier, 16 tokens each",
    "hot.pages_in_use": "slots of the exact tier that hold a copy",
    "cache.bits_per_element": "bits of one stored element, scales included",
    "cache.bytes_per_token": "bytes of one token, all layers",
    "cache.compression_ratio": "the engine's own bytes a token over ours",
    "cache.cache_bytes": "bytes of the pages and the exact tier",
    "cache.hot_pool_bytes": "bytes of the exact tier",
    "cache.capacity_tokens": "tokens that the pages hold",
    "cache.capacity_tokens_uncompressed": "tokens that the same bytes would hold in the engine's own format",
    "cache.saved_bytes": "what those tokens would take in the engine's own format, less what they take",
}


def samples(stats: contract.Stats) -> Iterable[Sample]:
    """The figures for /metrics: `manthanquant_<section>_<field>`; what was not measured is left out."""
    for table, is_counter in ((_COUNTERS, True), (_GAUGES, False)):
        for path, text in table.items():
            section, field_name = path.split(".")
            part = getattr(stats, section)
            value = None if part is None else getattr(part, field_name)
            if value is not None:
                name = field_name if field_name.startswith(section) else f"{section}_{field_name}"
                yield Sample(contract.METRIC_PREFIX + name, text, float(value), is_counter)
