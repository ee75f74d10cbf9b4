"""`manthanquant prepare`: all that can be done, and all that can go wrong, before the server starts.

Runs as the pod's init container, in the server's image and on the server's node: resolves the model, builds or finds
the kernels and checks them against the reference, calibrates or finds the calibration, and estimates the capacity. The
result is one `contract.PrepareReport`, written as the container's termination message, also when a step fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from manthanquant import calibration_cache, capacity, contract, model_source, settings
from manthanquant.contract import PrepareError, PrepareReport
from manthanquant.engine_flags import number

log = logging.getLogger("manthanquant.prepare")
# vLLM's own default of --max-num-seqs is 256 or 1024 by the size of the GPU. On a CPU the operator gives the flag.
DEFAULT_MAX_REQUESTS = 256


class PrepareFailed(Exception):
    """A step that failed; carries what the operator shows."""

    def __init__(self, reason: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.error = PrepareError(reason, message, field)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    environ = os.environ
    parser.add_argument(
        "model",
        nargs="?",
        default=environ.get(contract.ENV_MODEL_URI),
        help=f"hf://, pvc:// or file:// [${contract.ENV_MODEL_URI}]",
    )
    parser.add_argument("--model-dir", default=contract.MODEL_DIR, help="where the model's volume is mounted")
    parser.add_argument("--link", default=contract.RESOLVED_MODEL_LINK, help="where to put a link to the model")
    parser.add_argument("--report", default=contract.TERMINATION_LOG, help="where to write the result")
    parser.add_argument("--plan", action="store_true", help="only resolve the model and estimate the cache")
    settings.add_arguments(parser)


def run(args: argparse.Namespace, engine_flags: Sequence[str] = ()) -> int:
    """0, or 1 where a step failed. `engine_flags` are the server's: its length, requests and cache size are read."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    report = PrepareReport()
    steps = (_model, _capacity) if args.plan else (_model, _kernel, _calibration, _capacity)
    try:
        for step in steps:
            report = step(report, args, engine_flags)
    except PrepareFailed as failed:
        report = dataclasses.replace(report, error=failed.error)
    except Exception as error:  # whatever it is, the operator must be able to show it; the log has the traceback
        log.exception("prepare failed")
        report = dataclasses.replace(report, error=PrepareError("PrepareCrashed", f"{type(error).__name__}: {error}"))
    text = report.to_termination_message()
    Path(args.report).write_text(text)
    print(text)
    if report.error is None:
        return 0
    print(f"manthanquant prepare: {report.error.message}", file=sys.stderr)
    return 1


def _settings(args: argparse.Namespace) -> settings.Settings:
    try:
        return settings.from_args(args)
    except settings.SettingsError as error:
        raise PrepareFailed("InvalidSettings", str(error), "spec.kvCache") from error


def _model(report: PrepareReport, args: argparse.Namespace, engine_flags: Sequence[str]) -> PrepareReport:
    """Resolves the model, refuses one that the cache cannot hold, and links it."""
    wanted = _settings(args)
    if not args.model:
        raise PrepareFailed("InvalidUri", f"no model: give one, or set {contract.ENV_MODEL_URI}", "spec.model.uri")
    try:
        path = model_source.resolve(args.model, args.model_dir)
    except model_source.ModelError as error:
        raise PrepareFailed(error.reason, str(error), error.field) from error
    if not wanted.native:
        try:
            shape = capacity.model_shape(capacity.read_config(path))
        except capacity.UnsupportedModel as error:
            raise PrepareFailed("UnsupportedModel", str(error), "spec.kvCache.mode") from error
        known = {layer.index for layer in shape.layers}
        if missing := [index for index in wanted.skip_layers if index not in known]:
            message = f"layer {missing[0]} does not exist: the model has layers 0 to {max(known)}"
            raise PrepareFailed("InvalidSettings", message, "spec.kvCache.skipLayers")
    _link(Path(args.link), path)
    log.info("model %s at %s", args.model, path)
    return dataclasses.replace(report, model_path=str(path), model_bytes=model_source.size_bytes(path))


def _link(link: Path, target: Path) -> None:
    """Points `link` at `target`, in one step."""
    link.parent.mkdir(parents=True, exist_ok=True)
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    fresh.symlink_to(target)
    fresh.replace(link)


def _kernel(report: PrepareReport, args: argparse.Namespace, engine_flags: Sequence[str]) -> PrepareReport:
    """Builds or finds the kernels of the model's head sizes, and checks them against the reference."""
    wanted = _settings(args)
    if wanted.native:
        return report
    from manthanquant import kernel_report

    shape = capacity.model_shape(capacity.read_config(str(report.model_path)))
    if wanted.cache_dir:  # the builder reads the environment only
        os.environ[contract.ENV_CACHE_DIR] = wanted.cache_dir
    kernel = kernel_report.obtain(wanted, sorted({layer.head_size for layer in shape.layers}))
    log.info("kernels %s (%s)", kernel.arch, kernel.source or kernel.message)
    return dataclasses.replace(report, kernel=kernel)


def _calibration(report: PrepareReport, args: argparse.Namespace, engine_flags: Sequence[str]) -> PrepareReport:
    wanted = _settings(args)
    if wanted.native:
        return dataclasses.replace(report, calibration=contract.CalibrationReport("none", "NotApplicable"))
    model = Path(str(report.model_path))
    shape = capacity.model_shape(capacity.read_config(model))
    positions = calibration_cache.positions(number(engine_flags, "--max-model-len"), shape)
    _, calibration = calibration_cache.obtain(model, wanted, positions)
    log.info("key transform %s (%s)", calibration.transform, calibration.source)
    return dataclasses.replace(report, calibration=calibration)


def _capacity(report: PrepareReport, args: argparse.Namespace, engine_flags: Sequence[str]) -> PrepareReport:
    """The cache's cost from the model's shape; tokens only where the cache's size is given."""
    wanted = _settings(args)
    try:
        shape = capacity.model_shape(capacity.read_config(str(report.model_path)))
    except capacity.UnsupportedModel as error:  # served without us: nothing to estimate
        log.info("no estimate: %s", error)
        return report
    requests = number(engine_flags, "--max-num-seqs") or DEFAULT_MAX_REQUESTS
    size = number(engine_flags, "--kv-cache-memory-bytes")
    return dataclasses.replace(report, cache=capacity.estimate(shape, wanted, size, requests))
