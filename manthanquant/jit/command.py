"""`manthanquant build`: compile kernels before they are needed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import manthanquant
from manthanquant.formats import DEFAULT_FORMAT, PAGED_FORMATS, SUPPORTED_HEAD_SIZES, FormatError, get_paged
from manthanquant.jit.arch import ARCHES, Arch, cuda_arch, detect_cpu, is_cuda, named
from manthanquant.jit.build import default_cache_dir, obtain, ship
from manthanquant.jit.cache import KernelCache
from manthanquant.jit.errors import JitError
from manthanquant.jit.kernels import DTYPES, cpu_extension, cuda_extensions, vectors_extension
from manthanquant.jit.spec import Extension

PRUNE_DAYS = 30  # long enough for a rollback, or for replicas of two versions on one volume


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arches, formats = ", ".join(arch.name for arch in ARCHES), ", ".join(PAGED_FORMATS)
    parser.add_argument(
        "--arch", action="append", help=f"repeatable; default: this machine's CPU and GPUs. One of {arches}"
    )
    parser.add_argument("--format", action="append", help=f"repeatable; default: {DEFAULT_FORMAT}. One of {formats}")
    parser.add_argument("--head-size", action="append", type=int, help=f"repeatable; default: {SUPPORTED_HEAD_SIZES}")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help=f"GPUs only; repeatable; default: {DTYPES[0]}")
    parser.add_argument(
        "--prune", action="store_true", help="build nothing; remove what other versions left in the cache"
    )
    parser.add_argument("--older-than", type=float, default=PRUNE_DAYS, metavar="DAYS", help=f"default: {PRUNE_DAYS}")
    parser.add_argument("--output", type=Path, help="write a read-only set for an image here instead of the cache")


def run(args: argparse.Namespace) -> int:
    """Print one line a kernel; the exit status is 1 where one could not be built, or removed."""
    try:
        if args.prune:
            cache = KernelCache(default_cache_dir())
            for entry in cache.prune(manthanquant.__version__, args.older_than * 86400):
                print(f"removed {entry}")
            return 0
        for arch in [named(name) for name in args.arch] if args.arch else of_this_machine():
            with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
                extensions = list(_extensions(arch, args))
                make = lambda e, arch=arch: ship(e, arch, args.output) if args.output else obtain(e, arch)
                for extension, result in zip(extensions, pool.map(make, extensions)):
                    seconds = "" if result.seconds is None else f" in {result.seconds:.1f} s"
                    print(f"{extension.name} {result.arch} {result.digest}: {result.source}{seconds}, {result.path}")
    except (JitError, FormatError, OSError) as error:
        print(f"manthanquant build: {error}", file=sys.stderr)
        return 1
    return 0


def of_this_machine() -> list[Arch]:
    """The CPU's architecture, and each one of the GPUs that PyTorch sees. Raises `JitError` for an unsupported GPU."""
    import torch

    capabilities = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return [detect_cpu(), *map(cuda_arch, sorted(capabilities))]


def _extensions(arch: Arch, args: argparse.Namespace) -> Iterator[Extension]:
    """What to build for one architecture, each kernel once."""
    wanted: dict[str, Extension] = {}
    for fmt in [get_paged(name) for name in args.format or [DEFAULT_FORMAT]]:
        for head_size in args.head_size or SUPPORTED_HEAD_SIZES:
            if is_cuda(arch):
                found = [e for dtype in args.dtype or DTYPES[:1] for e in cuda_extensions(fmt, head_size, dtype)]
                found.append(vectors_extension())
            else:
                found = [cpu_extension(fmt, head_size)]
            wanted.update((extension.name, extension) for extension in found)
    yield from wanted.values()
