"""`manthanquant bench`: run the suites, print the table, save it."""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import manthanquant
from manthanquant.bench.report import Setting, draw, table, write_json
from manthanquant.bench.result import Result

if TYPE_CHECKING:
    from manthanquant.bench.timing import Roof

# Each has `run(peers) -> Iterator[Result]`.
SUITES = {
    "store": "manthanquant.bench.store",
    "vectors": "manthanquant.bench.vectors",
    "decode": "manthanquant.bench.decode",
    "prefill": "manthanquant.bench.prefill",
}
CPU_SUITE = "cpu"  # needs no GPU, and prints a table of its own
PEER_PACKAGES = ("vllm",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"default: {', '.join(SUITES)}; or {CPU_SUITE} alone"
    )
    parser.add_argument("--no-peers", action="store_true", help="time only our own kernels")
    parser.add_argument("--output", type=Path, help="write bench.json, bench.md and bench.png to this directory")


def run(args: argparse.Namespace) -> int:
    """Exit status 1 where there is no GPU, 2 for an unknown suite."""
    if args.suites == [CPU_SUITE]:
        from manthanquant.bench import cpu

        return cpu.main([])
    unknown = [name for name in args.suites if name not in SUITES]
    if unknown:
        print(
            f"manthanquant bench: unknown suite {unknown[0]!r}: use {', '.join(SUITES)}, or {CPU_SUITE} alone",
            file=sys.stderr,
        )
        return 2
    import torch

    if not torch.cuda.is_available():
        print("manthanquant bench: no CUDA GPU: run it on the machine whose kernels you want timed", file=sys.stderr)
        return 1
    from manthanquant.bench.timing import measure_roof

    roof = measure_roof()
    setting = _setting()
    print(f"{setting.card}, driver {setting.driver}, torch {setting.torch}")
    print(f"measured bandwidth: read {roof.read:,.0f}, copy {roof.copy:,.0f} GB/s")
    results: list[Result] = []
    for name in args.suites or SUITES:
        for result in importlib.import_module(SUITES[name]).run(peers=not args.no_peers):
            print(f"{result.suite}: {result.case}: {result.subject}: {result.milliseconds:.4f} ms", flush=True)
            results.append(result)
        if args.output:  # after each suite: a later one that fails leaves the results before it
            _save(args.output, results, roof, setting)
    print("\n" + table(results, roof))
    return 0


def _save(output: Path, results: Sequence[Result], roof: Roof, setting: Setting) -> None:
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "bench.json", results, roof, setting)
    (output / "bench.md").write_text(_heading(setting, roof.read) + table(results, roof) + "\n")
    draw(output / "bench.png", results, roof, setting)


def _setting() -> Setting:
    import torch

    peers = [_peer(name) for name in PEER_PACKAGES if importlib.util.find_spec(name)]
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    return Setting(
        card=torch.cuda.get_device_name(),
        torch=torch.__version__,
        cuda=str(torch.version.cuda),
        driver=driver,
        manthanquant=manthanquant.__version__,
        peers=", ".join(peers),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def _peer(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:  # on the path, but not installed
        return f"{name}, version unknown"


def _heading(setting: Setting, read: float) -> str:
    return (
        f"{setting.card}, {setting.date}, manthanquant {setting.manthanquant}, torch {setting.torch}, "
        f"CUDA {setting.cuda}, driver {setting.driver}, peers: {setting.peers or 'none'}. "
        f"Medians of CUDA graph replays; the roof is {read:,.0f} GB/s, a sum over 4 GiB in the same run.\n\n"
    )
