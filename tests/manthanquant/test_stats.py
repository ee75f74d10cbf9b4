import json

import pytest
import torch

from manthanquant import contract, stats
from manthanquant.stats import WorkerSnapshot, WriteCounters


def filled(calls: int) -> WriteCounters:
    counters = WriteCounters()
    generator = torch.Generator().manual_seed(calls)
    for _ in range(calls):
        counters.add_write(tokens=2, kv_heads=3, exact_bytes=256, coded_bytes=52, errors=0)
    exact = torch.randn(2, 3, 64, generator=generator)
    counters.add_sample(exact, exact + 0.1, exact, exact * 2)
    return counters


def test_a_write_counts_both_sides() -> None:
    counters = WriteCounters()
    counters.add_write(tokens=5, kv_heads=3, exact_bytes=256, coded_bytes=52, errors=1)
    report = counters.report()
    assert (report.calls, report.vectors, report.errors) == (1, 30, 1)
    assert report.bytes_uncompressed == 5 * 3 * 256
    assert report.bytes_uncompressed / report.bytes_compressed == pytest.approx(256 / 52)


def test_what_was_never_sampled_is_absent() -> None:
    report = WriteCounters().report()
    assert report.key_cosine is None and report.relative_mse is None


def test_sampled_figures() -> None:
    counters = WriteCounters()
    key = torch.tensor([[[3.0, 4.0]]])
    counters.add_sample(key, torch.tensor([[[4.0, 3.0]]]), key, key * 0.5)
    report = counters.report()
    assert report.sampled_vectors == 2
    assert report.key_cosine == pytest.approx(24 / 25)
    assert report.value_cosine == pytest.approx(1)
    assert report.relative_mse == pytest.approx((2 + 25 / 4) / 50)


def test_a_vector_that_is_not_finite_is_left_out_of_the_sample() -> None:
    counters = WriteCounters()
    key = torch.ones(2, 1, 4)
    key[1, 0, 2] = torch.nan
    counters.add_sample(key, torch.ones(2, 1, 4), torch.ones(2, 1, 4), torch.ones(2, 1, 4))
    report = counters.report()
    assert report.relative_mse == 0
    assert report.key_cosine == pytest.approx(1)
    assert report.value_cosine == pytest.approx(1)


def test_snapshot_round_trip_is_plain_json() -> None:
    snapshot = WorkerSnapshot(
        filled(3), contract.HotStats(8, 2, 1), contract.KernelReport("cpu-avx512", "Cached"), page_bytes=7
    )
    assert WorkerSnapshot.from_wire(json.loads(json.dumps(snapshot.to_wire()))) == snapshot
    assert WorkerSnapshot.from_wire(WorkerSnapshot().to_wire()) == WorkerSnapshot()


def combined(workers: list[WorkerSnapshot], tokens: int | None = 1000) -> contract.Stats:
    return stats.combine(
        workers,
        model="m",
        format="k42v3",
        mode="compressed",
        uptime_seconds=1.0,
        capacity_tokens=tokens,
        load=contract.LoadStats(requests_running=1),
    )


def worker(calls: int) -> WorkerSnapshot:
    return WorkerSnapshot(
        filled(calls),
        contract.HotStats(8, 2, 1),
        page_bytes=52_000,
        hot_pool_bytes=500,
        bytes_per_token=52,
        bytes_per_token_uncompressed=256,
    )


def test_workers_are_summed() -> None:
    found = combined([worker(2), worker(3)])
    assert (found.writes.calls, found.writes.vectors) == (5, 60)
    assert found.hot == contract.HotStats(16, 4, 2)
    assert (found.cache.bytes_per_token, found.cache.compression_ratio) == (104, 4.923)
    assert found.cache.bits_per_element == 3.25
    assert found.cache.cache_bytes == 105_000
    assert found.cache.saved_bytes == 1000 * 512 - 105_000
    assert contract.Stats.from_json(found.to_json()) == found


def test_without_the_allocators_figure_the_capacity_is_absent() -> None:
    found = combined([worker(1)], tokens=None)
    assert found.cache.capacity_tokens is None
    assert "capacityTokens" not in found.to_json()


def test_line_has_the_seeds_figures() -> None:
    line = stats.line(combined([worker(4)]))
    assert line.startswith("[ManthanQuant pid=")
    assert "calls=4 compressed=48 ratio=4.92x saved=0.00MB" in line
    assert line.endswith("errors=0")


def test_line_before_the_first_write_claims_nothing() -> None:
    line = stats.line(combined([WorkerSnapshot()]))
    assert "ratio" not in line and "cosine" not in line and "calls=0" in line


def test_samples_for_metrics_leave_out_what_was_not_measured() -> None:
    before = {sample.name for sample in stats.samples(combined([WorkerSnapshot()]))}
    after = {sample.name: sample for sample in stats.samples(combined([worker(4)]))}
    assert "manthanquant_writes_key_cosine" not in before
    assert after["manthanquant_writes_calls"] == stats.Sample(
        "manthanquant_writes_calls", "calls of the cache write, one a layer and step", 4.0, True
    )
    assert after["manthanquant_cache_compression_ratio"].value == 4.923
    assert not after["manthanquant_cache_bytes"].is_counter
