import dataclasses
import subprocess
import sys

import pytest

from manthanquant.contract import (
    TERMINATION_LIMIT,
    CacheReport,
    CalibrationReport,
    ContractError,
    KernelReport,
    PrepareError,
    PrepareReport,
    Stats,
    WriteStats,
)

STATS = Stats(
    model="m",
    kernel=KernelReport("cpu-avx512", source="Built", digest="abc", build_seconds=2.5),
    calibration=CalibrationReport("gain", "Cached"),
    cache=CacheReport("k42v3", "compressed", bytes_per_token=100, compression_ratio=5.12),
    writes=WriteStats(calls=3, vectors=12),
)


def test_round_trip_leaves_out_what_was_not_measured():
    text = STATS.to_json()
    assert Stats.from_json(text) == STATS
    assert "keyCosine" not in text and '"errors":0' in text and '"bytesPerToken":100' in text


def test_a_newer_writers_extra_fields_are_ignored():
    text = STATS.to_json()[:-1] + ',"somethingNew":{"a":1}}'
    assert Stats.from_json(text) == STATS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no", "Stats: not JSON"),
        ("[]", "Stats: expected an object"),
        ("{}", "Stats.model: missing"),
        (STATS.to_json().replace('"calls":3', '"calls":"3"'), "Stats.writes.calls: expected int, got '3'"),
        (STATS.to_json().replace('"calls":3', '"calls":true'), "Stats.writes.calls: expected int, got True"),
        (STATS.to_json().replace('"schema":1', '"schema":2'), "Stats.schema: 2, expected 1"),
    ],
)
def test_what_breaks_the_contract_is_named(text, message):
    with pytest.raises(ContractError, match=message):
        Stats.from_json(text)


def test_whole_numbers_pass_for_fractions():
    text = STATS.to_json().replace('"buildSeconds":2.5', '"buildSeconds":2')
    assert Stats.from_json(text).kernel.build_seconds == 2.0


def test_a_termination_message_fits():
    report = PrepareReport(error=PrepareError("ModelNotFound", "x" * 9000, "spec.model.uri"))
    text = report.to_termination_message()
    assert len(text.encode()) <= TERMINATION_LIMIT
    again = PrepareReport.from_json(text)
    assert again.error is not None and again.error.reason == "ModelNotFound"
    small = dataclasses.replace(report, error=PrepareError("A", "b"))
    assert small.to_termination_message() == small.to_json()


def test_the_operators_side_needs_no_pytorch():
    code = "import manthanquant, manthanquant.contract, manthanquant.formats, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-S", "-c", code], check=True)


def test_the_operator_folder_does_not_shadow_the_standard_library():
    subprocess.run([sys.executable, "-S", "-c", "import collections, operator; operator.add"], check=True)
