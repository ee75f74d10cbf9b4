"""Statistics -> figures: sums, means, rounding, and what is absent."""

from __future__ import annotations

import dataclasses

import pytest
from manthanquant_operator import telemetry
from manthanquant_operator.api import KVCacheStatus
from manthanquant_operator.telemetry import Sample

from manthanquant.contract import CacheReport, CalibrationReport, KernelReport, LoadStats, Stats, WriteStats

CACHE = CacheReport(
    "k42v3",
    "compressed",
    3.25,
    100,
    512,
    5.1234,
    capacity_tokens=1000,
    capacity_tokens_uncompressed=195,
    saved_bytes=1 << 30,
)
STATS = Stats("m", KernelReport("sm_90a", "Cached", "d"), CalibrationReport("gain", "Cached"), CACHE)


def _sample(pod: str = "a", **more: object) -> Sample:
    return Sample(pod, dataclasses.replace(STATS, **more), 0.0)  # type: ignore[arg-type]


def test_counts_are_summed_and_properties_are_not() -> None:
    cache = telemetry.measured([_sample("a"), _sample("b")])
    assert (cache["capacity_tokens"], cache["capacity_tokens_uncompressed"]) == (2000, 390)
    assert (cache["saved_bytes"], cache["saved"]) == (2 << 30, "2.0Gi")
    assert (cache["bytes_per_token"], cache["compression_ratio"], cache["bits_per_element"]) == (100, 5.12, 3.25)


def test_the_cosine_is_weighted_by_its_samples() -> None:
    samples = [
        _sample("a", writes=WriteStats(sampled_vectors=100, key_cosine=1.0, value_cosine=1.0)),
        _sample("b", writes=WriteStats(sampled_vectors=300, key_cosine=0.98, value_cosine=0.96)),
    ]
    assert telemetry.measured(samples)["cosine_similarity"] == pytest.approx((2 * 100 + 300 * 1.94) / 800, abs=1e-4)


def test_what_was_not_measured_is_absent_and_zero_is_zero() -> None:
    bare = CacheReport("bf16", "off")
    status = telemetry.stamp(telemetry.measured([_sample(cache=bare)]), None, "t")
    dumped = status.model_dump(by_alias=True, exclude_none=True)
    assert dumped == {
        "format": "bf16", "mode": "off", "writes": 0, "vectorsCompressed": 0, "errors": 0, "source": "Measured",
        "measuredAt": "t",
    }  # fmt: skip


def test_an_estimate_has_no_measured_figures() -> None:
    status = KVCacheStatus(**telemetry.estimated(CACHE, 3))
    assert status.source == "Estimated" and status.capacity_tokens == 3000
    assert status.writes is None and status.measured_at is None


def test_the_time_of_measurement_moves_with_the_figures() -> None:
    first = telemetry.stamp(telemetry.measured([_sample()]), None, "t1")
    assert telemetry.stamp(telemetry.measured([_sample()]), first, "t2").measured_at == "t1"
    changed = telemetry.measured([_sample(writes=WriteStats(calls=1))])
    assert telemetry.stamp(changed, first, "t2").measured_at == "t2"


def test_a_rate_needs_two_samples_of_one_run() -> None:
    def stats(tokens: int | None) -> Stats:
        return dataclasses.replace(STATS, load=LoadStats(generated_tokens=tokens))

    first = telemetry.sample("a", stats(100), 10.0, None)
    assert first.tokens_per_second is None
    assert telemetry.sample("a", stats(160), 12.0, first).tokens_per_second == 30.0
    assert telemetry.sample("a", stats(5), 12.0, first).tokens_per_second is None  # restarted
    assert telemetry.sample("a", stats(None), 12.0, first).tokens_per_second is None


def test_load_is_summed_with_a_row_for_each_of_few_servers() -> None:
    def sample(index: int) -> Sample:
        return dataclasses.replace(
            _sample(f"p{index:02}", load=LoadStats(2, 1, 100, 0.256, 3)), tokens_per_second=33.333
        )

    found = telemetry.load([sample(1), sample(0)])
    assert found and (found.requests_running, found.requests_waiting, found.preemptions) == (4, 2, 6)
    assert (found.kv_usage_percent, found.generated_tokens_per_second) == (26, 66.0)
    assert found.pods and [row.pod for row in found.pods] == ["p00", "p01"]
    many = telemetry.load([sample(i) for i in range(telemetry.MAX_POD_ROWS + 1)])
    assert many and many.pods is None and many.requests_running == 2 * (telemetry.MAX_POD_ROWS + 1)


def test_without_load_there_is_none() -> None:
    assert telemetry.load([_sample()]) is None


def test_the_kernel_says_why_it_is_slow() -> None:
    found = telemetry.kernel(
        KernelReport("torch", message="no compiler"), CalibrationReport("hadamard", "Failed", message="no text")
    )
    assert (found.sm_arch, found.source, found.message) == ("torch", None, "no compiler; no text")


@pytest.mark.parametrize(
    ("value", "expected"), [(0, "0"), (1023, "1023"), (1024, "1.0Ki"), (3_435_973_836, "3.2Gi"), (-(1 << 20), "-1.0Mi")]
)
def test_bytes_for_people(value: int, expected: str) -> None:
    assert telemetry.human_bytes(value) == expected
