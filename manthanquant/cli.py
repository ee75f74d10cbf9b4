"""The console script `manthanquant`: one subcommand a module, imported only when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

import manthanquant

# Each module has `add_arguments(parser)` and `run(args) -> int`. The summaries are here, so that help imports nothing.
COMMANDS = {
    "serve": ("manthanquant.serve", "serve a model with vLLM on a compressed cache; takes vLLM's flags too"),
    "formats": ("manthanquant.formats_table", "print the formats: bits, bytes a token, ratio"),
    "plan": ("manthanquant.plan", "print what a model's cache costs and how many tokens fit, without loading it"),
    "build": ("manthanquant.jit.command", "compile the kernels for this machine, or for others"),
    "quality": ("manthanquant.quality", "measure what a format does to a model's predictions"),
    "bench": ("manthanquant.bench.command", "time the kernels beside those of others"),
    "prepare": ("manthanquant.prepare", "what the init container does: model, kernels, calibration, capacity"),
}


class Parser(argparse.ArgumentParser):
    """One line for an error, not the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; 2 for bad arguments, else what it returns."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="manthanquant", description=manthanquant.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=manthanquant.__version__)
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")
    name = next((item for item in argv if not item.startswith("-")), None)
    for known, (module, summary) in COMMANDS.items():
        command = commands.add_parser(known, help=summary, description=summary, allow_abbrev=False)
        if known == name:
            importlib.import_module(module).add_arguments(command)
    if name is None:
        parser.parse_args(argv)
        parser.print_help()
        return 2
    args, rest = parser.parse_known_args(argv)
    run = importlib.import_module(COMMANDS[name][0]).run
    if name in ("serve", "prepare"):  # these pass the engine's own flags on
        return int(run(args, rest))
    if rest:
        parser.error(f"unknown argument {rest[0]}")
    return int(run(args))


if __name__ == "__main__":
    sys.exit(main())
