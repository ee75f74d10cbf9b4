"""Builds or finds the kernels that some settings need, and says so as the contract has it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from manthanquant import formats, settings
from manthanquant.contract import KernelReport
from manthanquant.jit import BuildResult, JitError, detect_cpu
from manthanquant.jit import obtain as obtain_extension
from manthanquant.jit.kernels import cpu_extension

log = logging.getLogger(__name__)
TORCH = "torch"


def obtain(wanted: settings.Settings, head_sizes: Sequence[int]) -> KernelReport:
    """The kernels for these head sizes, built where they are not yet; the PyTorch path where they cannot be."""
    fmt = formats.get(wanted.format)
    if wanted.backend == TORCH:
        return KernelReport(TORCH, message="the PyTorch path was asked for")
    if not isinstance(fmt, formats.Format):
        return KernelReport(TORCH, message=f"format {fmt.name} has no kernel")
    try:
        found = [obtain_extension(cpu_extension(fmt, size), detect_cpu()) for size in head_sizes]
    except JitError as error:
        log.warning("no compiled kernel, the PyTorch path serves: %s", error)
        return KernelReport(TORCH, message=str(error))
    return combined(found)


def combined(found: Sequence[BuildResult]) -> KernelReport:
    """One report of several builds: built if any was, and the time of all."""
    seconds = [result.seconds for result in found if result.seconds is not None]
    built = next((result for result in found if result.source == "Built"), found[0])
    messages = [result.message for result in found if result.message]
    return KernelReport(
        built.arch,
        built.source,
        built.digest,
        round(sum(seconds), 1) if seconds else None,
        "; ".join(messages) or None,
    )
