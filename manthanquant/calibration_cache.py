"""The calibration of a model and these settings: found, or made and kept. Used before serving, by launcher and
`prepare` alike, so that what the init container made the server finds."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

from manthanquant import contract, formats, settings
from manthanquant.capacity import ModelShape

if TYPE_CHECKING:
    from manthanquant.transform import Kind

log = logging.getLogger(__name__)
MIN_POSITIONS = 8192


def positions(served_length: int | None, shape: ModelShape) -> int:
    """Positions to average the statistics over: the served length, rounded up so that near settings share a file."""
    longest = shape.max_positions or MIN_POSITIONS
    wanted = max(served_length or longest, min(MIN_POSITIONS, longest))
    return 1 << (wanted - 1).bit_length()


def obtain(
    model: Path, wanted: settings.Settings, max_positions: int
) -> tuple[Path | None, contract.CalibrationReport]:
    """The calibration's file and what to say of it; no file where none is wanted or none could be made.

    A calibration that fails does not stop the serving: the Hadamard transform needs none, and the report says so.
    """
    if wanted.native or wanted.format == formats.SEED3.name:
        return None, contract.CalibrationReport("none", "NotApplicable")
    if wanted.calibration == "off" and wanted.calibration_file is None:
        return None, contract.CalibrationReport("hadamard", "Off")
    from manthanquant import calibration

    if wanted.calibration_file is not None:
        path = Path(wanted.calibration_file)
        return path, contract.CalibrationReport(calibration.load(path).kind, "Cached")
    try:
        return _find_or_make(model, wanted, max_positions)
    except (calibration.CalibrationError, OSError) as error:
        log.warning("calibration failed, the Hadamard transform serves: %s", error)
        return None, contract.CalibrationReport("hadamard", "Failed", message=str(error))


def _find_or_make(
    model: Path, wanted: settings.Settings, max_positions: int
) -> tuple[Path, contract.CalibrationReport]:
    from manthanquant import calibrate, calibration

    fmt = formats.get_paged(wanted.format)
    text = Path(wanted.calibration_text).read_text() if wanted.calibration_text else calibrate.built_in_text()
    recent, sinks = wanted.recent_tokens, wanted.sink_tokens
    kind = calibrate.DEFAULT_KINDS[fmt.name] if wanted.calibration == "auto" else cast("Kind", wanted.calibration)
    key = calibration.cache_key(
        model, fmt, max_positions, text=text, kind=kind, recent_tokens=recent, sink_tokens=sinks
    )
    path = calibration.cache_path(settings.cache_dir(wanted), fmt, key)
    if path.exists():
        try:
            return path, contract.CalibrationReport(calibration.load(path, key).kind, "Cached")
        except calibration.CalibrationError as error:
            log.warning("%s: calibrating anew", error)
    log.info("calibrating %s for %s", fmt.name, model)
    started = time.monotonic()
    made = calibrate.calibrate(model, fmt, max_positions, text=text, kind=kind, recent_tokens=recent, sink_tokens=sinks)
    made.save(path)
    seconds = round(time.monotonic() - started, 1)
    log.info("calibrated %s in %.1f s: %s", made.kind, seconds, path)
    return path, contract.CalibrationReport(made.kind, "Calibrated", seconds)
