"""The bench's table, files and argument errors; what it measures needs a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from manthanquant import cli
from manthanquant.bench.report import Setting, draw, table, write_json
from manthanquant.bench.result import OURS, Result
from manthanquant.bench.timing import Roof

ROOF = Roof(read=4000.0, copy=3000.0)
SETTING = Setting("card", "2.11", "13.0", "580", "0.1.0", "", "2026-11-24")
RESULTS = [
    Result("store", "8192 tokens", f"{OURS} k3v3 hadamard", 0.02, 40_000_000),
    Result("store", "8192 tokens", "a peer", 0.2, 40_000_000, "slow"),
]


def test_table_states_bandwidth_and_share() -> None:
    lines = table(RESULTS, ROOF).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[4:7]] == ["0.0200", "2,000", "50%"]
    assert "5%" in lines[3] and "slow" in lines[3]
    assert len({len(line) for line in lines}) == 1


def test_what_the_matrix_units_bound_has_no_share_of_bandwidth() -> None:
    result = Result("prefill", "a chunk", OURS, 2.0, 40_000_000, operations=10**12)
    cells = [cell.strip() for cell in table([result], ROOF).splitlines()[2].split("|")]
    assert cells[4:7] == ["2.0000", "500 TFLOP/s", ""]


def test_json_holds_every_number(tmp_path: Path) -> None:
    write_json(tmp_path / "bench.json", RESULTS, ROOF, SETTING)
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["roof_gb_s"]["read"] == 4000.0 and content["setting"]["card"] == "card"
    assert [row["milliseconds"] for row in content["results"]] == [0.02, 0.2]


def test_picture_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(tmp_path / "bench.png", RESULTS, ROOF, SETTING)
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_suite_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "sotre"]) == 2
    assert "unknown suite 'sotre': use store" in capsys.readouterr().err


def test_no_gpu_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["bench"]) == 1
    assert "no CUDA GPU" in capsys.readouterr().err
