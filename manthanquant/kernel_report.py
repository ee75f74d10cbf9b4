"""The kernels that some settings need, ready to serve, and what to say of them as the contract has it."""

from __future__ import annotations

from collections.abc import Sequence

from manthanquant import formats, ops, settings
from manthanquant.contract import KernelReport

TORCH = "torch"


def obtain(wanted: settings.Settings, head_sizes: Sequence[int]) -> KernelReport:
    """Builds or finds the kernels of these head sizes, checked against the reference; says what will serve."""
    fmt = formats.get(wanted.format)
    if not isinstance(fmt, formats.Format):
        return KernelReport(TORCH, message=f"format {fmt.name} has no kernel")
    if wanted.backend == TORCH:
        return KernelReport(TORCH, message="the PyTorch path was asked for")
    return combined([ops.kernels(fmt, size).report for size in head_sizes])


def combined(reports: Sequence[KernelReport]) -> KernelReport:
    """One report of several head sizes: the PyTorch path or a fresh build if any was, and the seconds of all."""
    seconds = [report.build_seconds for report in reports if report.build_seconds is not None]
    worst = min(reports, key=lambda report: (report.arch != TORCH, report.source != "Built"))
    messages = dict.fromkeys(report.message for report in reports if report.message)
    return KernelReport(
        worst.arch, worst.source, worst.digest, round(sum(seconds), 1) if seconds else None, "; ".join(messages) or None
    )
