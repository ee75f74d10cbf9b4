"""What the user asked of the cache: read from flags and environment, checked once, handed to every process.

Standard library only. The launcher, the plug-in's workers, `prepare` and `plan` all read the same `Settings`; a flag
wins over its environment variable (`contract.ENV_*`), which wins over the default.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from manthanquant import contract, formats


class SettingsError(ValueError):
    """A setting that cannot be served; the text names it, the value found and the remedy."""


ENV_CALIBRATION_REPORT = "MANTHANQUANT_CALIBRATION_REPORT"  # internal: launcher to workers, JSON
CALIBRATIONS = ("auto", "gain", "dense", "off")
BACKENDS = ("auto", "torch")
FLAGS = {
    "format": ("--kv-format", contract.ENV_FORMAT),
    "mode": ("--mode", contract.ENV_MODE),
    "recent_tokens": ("--recent-tokens", contract.ENV_RECENT_TOKENS),
    "sink_tokens": ("--sink-tokens", contract.ENV_SINK_TOKENS),
    "skip_layers": ("--skip-layers", contract.ENV_SKIP_LAYERS),
    "calibration": ("--calibration", contract.ENV_CALIBRATION),
    "calibration_text": ("--calibration-text", contract.ENV_CALIBRATION_TEXT),
    "calibration_file": ("--calibration-file", contract.ENV_CALIBRATION_FILE),
    "backend": ("--kernel-backend", contract.ENV_BACKEND),
    "cache_dir": ("--cache-dir", contract.ENV_CACHE_DIR),
}
_HELP = {
    "format": f"format of the cache: {', '.join(formats.FORMAT_NAMES)} (default {formats.DEFAULT_FORMAT})",
    "mode": "compressed: the pages hold codes; shadow: the engine's own cache serves and each write is also "
    f"compressed and measured; off: no plug-in (default {contract.DEFAULT_MODE})",
    "recent_tokens": "newest tokens of a request that are also kept exact; 0 for none "
    f"(default {contract.DEFAULT_RECENT_TOKENS})",
    "sink_tokens": f"first tokens of a request that are also kept exact (default {contract.DEFAULT_SINK_TOKENS})",
    "skip_layers": "comma-separated indices of layers that keep the engine's own cache",
    "calibration": "auto: calibrate the transform before serving, or find the one made before, of the kind that suits "
    "the format; gain, dense: of this kind (dense has less error, gain costs a GPU less time); off: Hadamard",
    "calibration_text": "a text file to calibrate on, instead of the built-in text",
    "calibration_file": "a ready calibration; implies no search and no new one",
    "backend": "auto: the compiled kernels; torch: the PyTorch path",
    "cache_dir": "where compiled kernels and calibrations are kept",
}


@dataclass(frozen=True)
class Settings:
    """Checked settings; `format` is canonical (no alias)."""

    format: str = formats.DEFAULT_FORMAT
    mode: str = contract.DEFAULT_MODE
    recent_tokens: int = contract.DEFAULT_RECENT_TOKENS
    sink_tokens: int = contract.DEFAULT_SINK_TOKENS
    skip_layers: tuple[int, ...] = ()
    calibration: str = "auto"
    calibration_text: str | None = None
    calibration_file: str | None = None
    backend: str = "auto"
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", formats.ALIASES.get(self.format, self.format))
        _one_of("format", self.format, formats.FORMAT_NAMES)
        _one_of("mode", self.mode, contract.MODES)
        _one_of("calibration", self.calibration, CALIBRATIONS)
        _one_of("backend", self.backend, BACKENDS)
        for name in ("recent_tokens", "sink_tokens"):
            if getattr(self, name) < 0:
                raise _error(name, getattr(self, name), "give a number of tokens, 0 or more")
        if self.mode == "compressed" and self.format == formats.SEED3.name:
            raise _error("format", self.format, f"it has no page: use --mode shadow, or {formats.DEFAULT_FORMAT}")

    @property
    def native(self) -> bool:
        """Whether the engine serves without the plug-in: mode `off`, or a format of the engine's own."""
        return self.mode == "off" or self.format in formats.ENGINE_FORMATS

    def to_env(self) -> dict[str, str]:
        """The environment that gives a child process the same settings; what is unset is left out."""
        values = dataclasses.asdict(self)
        values["skip_layers"] = ",".join(map(str, self.skip_layers)) or None
        return {variable: str(values[name]) for name, (_, variable) in FLAGS.items() if values[name] is not None}


def _label(name: str) -> str:
    flag, variable = FLAGS[name]
    return f"{flag} (or {variable})"


def _error(name: str, value: object, remedy: str) -> SettingsError:
    return SettingsError(f"{_label(name)}: {value!r} is not possible: {remedy}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise _error(name, value, f"use one of {', '.join(allowed)}")


def _parse(name: str, text: str) -> object:
    if name in ("recent_tokens", "sink_tokens"):
        try:
            return int(text)
        except ValueError:
            raise _error(name, text, "give a number of tokens") from None
    if name == "skip_layers":
        try:
            layers = tuple(sorted({int(part) for part in text.split(",") if part.strip()}))
        except ValueError:
            layers = (-1,)
        if any(layer < 0 for layer in layers):
            raise _error(name, text, "give layer indices from 0, separated by commas, such as 0,1,29")
        return layers
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Our flags. None has a default: an absent flag leaves the environment's value standing."""
    group = parser.add_argument_group("KV cache")
    for name, (flag, variable) in FLAGS.items():
        group.add_argument(flag, dest=f"kv_{name}", metavar="X", help=f"{_HELP[name]} [${variable}]")


def from_env(environ: Mapping[str, str] | None = None) -> Settings:
    """Settings of the environment alone; an empty variable counts as unset. Raises `SettingsError`."""
    return _build({}, os.environ if environ is None else environ)


def from_args(args: argparse.Namespace, environ: Mapping[str, str] | None = None) -> Settings:
    """Settings of flags parsed by `add_arguments`, over the environment. Raises `SettingsError`."""
    given = {name: value for name in FLAGS if (value := getattr(args, f"kv_{name}")) is not None}
    return _build(given, os.environ if environ is None else environ)


def _build(given: Mapping[str, str], environ: Mapping[str, str]) -> Settings:
    values = {}
    for name, (_, variable) in FLAGS.items():
        text = given.get(name, environ.get(variable))
        if text:
            values[name] = _parse(name, text)
    return Settings(**values)  # type: ignore[arg-type]


def cache_dir(settings: Settings) -> Path:
    """Where compiled kernels and calibrations are kept: the setting, or the user's cache directory."""
    if settings.cache_dir:
        return Path(settings.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manthanquant"


def report_to_env(report: contract.CalibrationReport) -> str:
    """What the launcher knows of the calibration, for `ENV_CALIBRATION_REPORT`."""
    return json.dumps(dataclasses.asdict(report))


def report_from_env(environ: Mapping[str, str] | None = None) -> contract.CalibrationReport | None:
    """Inverse of `report_to_env`; None without a launcher."""
    text = (os.environ if environ is None else environ).get(ENV_CALIBRATION_REPORT)
    return contract.CalibrationReport(**json.loads(text)) if text else None
