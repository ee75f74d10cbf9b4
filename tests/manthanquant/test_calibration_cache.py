from pathlib import Path
from typing import Any

import pytest

from manthanquant import calibrate, calibration, calibration_cache, formats
from manthanquant.calibration import Calibration, CalibrationError
from manthanquant.capacity import LayerShape, ModelShape
from manthanquant.contract import CalibrationReport
from manthanquant.settings import Settings
from manthanquant.transform import default_transform


def shape(max_positions: int | None) -> ModelShape:
    return ModelShape("llama", (LayerShape(0, "full", 2, 64),), 2, max_positions)


@pytest.mark.parametrize(
    ("served", "longest", "expected"),
    [
        (None, 8192, 8192),
        (4096, 8192, 8192),
        (4096, 131072, 8192),
        (20000, 131072, 32768),
        (None, 2048, 2048),
        (None, None, 8192),
        (100, 2048, 2048),
    ],
)
def test_near_lengths_share_a_calibration(served: int | None, longest: int | None, expected: int) -> None:
    assert calibration_cache.positions(served, shape(longest)) == expected


class Maker:
    """Stands for `calibrate.calibrate`: counts its calls, and fails where it is told to."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.fails = False

    def __call__(self, model: Path, fmt: formats.Format, max_positions: int, **settings: Any) -> Calibration:
        self.calls.append(settings)
        if self.fails:
            raise CalibrationError("the text has 3 tokens")
        key = calibration.cache_key(model, fmt, max_positions, **settings)
        return Calibration(fmt.name, settings["kind"], {0: default_transform(fmt, 64)}, key)


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> Maker:
    made = Maker()
    monkeypatch.setattr(calibrate, "calibrate", made)
    return made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def obtain(model: Path, **more: Any) -> tuple[Path | None, CalibrationReport]:
    return calibration_cache.obtain(model, Settings(cache_dir=str(model.parent / "cache"), **more), 8192)


def test_made_once_and_found_again(model: Path, maker: Maker) -> None:
    path, report = obtain(model)
    assert path is not None and path.is_file()
    assert (report.source, report.transform) == ("Calibrated", calibrate.DEFAULT_KINDS["k42v3"])
    assert report.seconds is not None
    again, report = obtain(model)
    assert (again, report.source, report.seconds) == (path, "Cached", None)
    assert len(maker.calls) == 1


@pytest.mark.parametrize("change", [{"format": "k4v4"}, {"recent_tokens": 64}, {"sink_tokens": 0}])
def test_other_settings_are_calibrated_anew(change: dict[str, Any], model: Path, maker: Maker) -> None:
    obtain(model)
    assert obtain(model, **change)[1].source == "Calibrated"


@pytest.mark.parametrize("kind", calibrate.KINDS)
def test_a_kind_asked_for_replaces_the_formats_own(kind: str, model: Path, maker: Maker) -> None:
    assert obtain(model, calibration=kind)[1].transform == kind
    assert obtain(model, calibration=kind)[1].source == "Cached"


def test_another_model_is_calibrated_anew(model: Path, maker: Maker) -> None:
    obtain(model)
    (model / "model.safetensors").write_bytes(b"others!")
    assert obtain(model)[1].source == "Calibrated"


def test_a_users_text(model: Path, maker: Maker) -> None:
    text = model.parent / "text"
    text.write_text("my own words")
    obtain(model, calibration_text=str(text))
    assert maker.calls[0]["text"] == "my own words"


def test_a_damaged_file_is_made_anew(model: Path, maker: Maker) -> None:
    path, _ = obtain(model)
    assert path is not None
    path.write_bytes(path.read_bytes()[:-1])
    assert obtain(model)[1].source == "Calibrated"
    assert obtain(model)[1].source == "Cached"


def test_a_failure_leaves_hadamard_and_says_why(model: Path, maker: Maker) -> None:
    maker.fails = True
    assert obtain(model) == (None, CalibrationReport("hadamard", "Failed", message="the text has 3 tokens"))


def test_a_text_that_is_not_there_is_a_failure(model: Path, maker: Maker) -> None:
    path, report = obtain(model, calibration_text="/no/such/text")
    assert (path, report.source) == (None, "Failed")
    assert "/no/such/text" in str(report.message)


def test_off_and_formats_without_a_transform(model: Path, maker: Maker) -> None:
    assert obtain(model, calibration="off") == (None, CalibrationReport("hadamard", "Off"))
    assert obtain(model, format="bf16") == (None, CalibrationReport("none", "NotApplicable"))
    assert obtain(model, format="seed3", mode="shadow") == (None, CalibrationReport("none", "NotApplicable"))
    assert maker.calls == []


def test_a_file_that_the_user_names_must_be_there(model: Path, maker: Maker) -> None:
    path, _ = obtain(model)
    assert obtain(model, calibration_file=str(path))[1].source == "Cached"
    with pytest.raises(CalibrationError):
        obtain(model, calibration_file="/no/such/file")
