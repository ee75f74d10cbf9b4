"""The CPU kernels of the working tree, built once into the checkout's `.cache` and shared by all tests."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from manthanquant import jit
from manthanquant.cpu_kernels import CpuKernels, load
from manthanquant.formats import Format

CACHE = Path(__file__).parents[2] / ".cache" / "kernels"


@cache
def cpu_kernels(fmt: Format, head_size: int, arch: str | None = None) -> CpuKernels:
    return load(fmt, head_size, jit.named(arch) if arch else None, CACHE)


def runnable(arch: str) -> bool:
    """Whether this machine runs what is built for `arch`."""
    names = [known.name for known in jit.arch.CPU_ARCHES]
    return names.index(arch) >= names.index(jit.detect_cpu().name)
