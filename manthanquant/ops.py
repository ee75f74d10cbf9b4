"""Store and attention by the best means that there is for a device, format and head size.

`kernels` chooses once a process and says what it chose and why (`report`). A kernel that cannot be built or that
disagrees with the reference is said in one warning, and the PyTorch path serves.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from manthanquant import cpu_kernels, reference, selfcheck
from manthanquant.chunk import attend, read_prefix
from manthanquant.contract import ENV_BACKEND, KernelReport
from manthanquant.formats import Format
from manthanquant.jit import JitError
from manthanquant.reference import HotPool
from manthanquant.transform import LayerTransform

log = logging.getLogger(__name__)

BACKENDS = ("auto", "torch")


class Kernels(Protocol):
    """Both operations for one format and head size. Shapes and meaning are those of `reference`.

    `attention` writes into `out` (any float dtype) if it is given. `chunk`: the new tokens' own keys and values
    `[T, KV heads, D]`, read in place of what the cache holds of them: a prefill's queries mostly read the prefill
    itself, which is at hand and exact. `sink_tokens` and `recent_tokens` then count the tokens before it.
    """

    report: KernelReport

    def store(
        self,
        key: Tensor,
        value: Tensor,
        cache: Tensor,
        slot_mapping: Tensor,
        transform: LayerTransform,
        hot: HotPool | None = None,
        hot_slots: Tensor | None = None,
    ) -> int: ...

    def attention(
        self,
        query: Tensor,
        cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        query_start_loc: Tensor,
        transform: LayerTransform,
        scale: float,
        *,
        window: int | None = None,
        soft_cap: float | None = None,
        sink_tokens: int = 0,
        recent_tokens: int = 0,
        hot: HotPool | None = None,
        chunk: tuple[Tensor, Tensor] | None = None,
        out: Tensor | None = None,
    ) -> Tensor: ...


class ReferenceKernels:
    """The PyTorch path."""

    def __init__(self, fmt: Format, message: str | None) -> None:
        self.report = KernelReport("torch", message=message)
        self._format = fmt

    def store(
        self,
        key: Tensor,
        value: Tensor,
        cache: Tensor,
        slot_mapping: Tensor,
        transform: LayerTransform,
        hot: HotPool | None = None,
        hot_slots: Tensor | None = None,
    ) -> int:
        return reference.store(key, value, cache, slot_mapping, self._format, transform, hot, hot_slots)

    def attention(
        self,
        query: Tensor,
        cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        query_start_loc: Tensor,
        transform: LayerTransform,
        scale: float,
        *,
        window: int | None = None,
        soft_cap: float | None = None,
        sink_tokens: int = 0,
        recent_tokens: int = 0,
        hot: HotPool | None = None,
        chunk: tuple[Tensor, Tensor] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        out = torch.zeros(query.shape, dtype=torch.float32) if out is None else out
        if chunk is None:
            return out.copy_(
                reference.attention(
                    query,
                    cache,
                    block_table,
                    seq_lens,
                    query_start_loc,
                    self._format,
                    transform,
                    scale,
                    window=window,
                    soft_cap=soft_cap,
                    sink_tokens=sink_tokens,
                    recent_tokens=recent_tokens,
                    hot=hot,
                )
            )
        starts = query_start_loc.tolist()
        tier = (self._format, transform, query.shape[-1], hot, sink_tokens, recent_tokens)
        for row, length in enumerate(seq_lens.tolist()):
            rows = slice(starts[row], starts[row + 1])
            before = length - (rows.stop - rows.start)
            first = max(0, before - window + 1) if window else 0
            key, value = (x[rows].float() for x in chunk)
            if before > first:
                old = read_prefix(cache, block_table[row], first, before, *tier)
                key, value = torch.cat([old[0], key]), torch.cat([old[1], value])
            if rows.stop > rows.start:
                out[rows] = attend(query[rows].float(), key, value, scale, window, soft_cap).to(out.dtype)
        return out


def kernels(fmt: Format, head_size: int, device_type: str = "cpu") -> Kernels:
    """The best kernels for a device, chosen once a process. The PyTorch path is the last resort.

    `MANTHANQUANT_BACKEND=torch` forces the PyTorch path; its other value is `auto`.
    """
    return _choose(fmt, head_size, device_type)


@cache
def _choose(fmt: Format, head_size: int, device_type: str) -> Kernels:
    backend = os.environ.get(ENV_BACKEND) or "auto"
    if backend not in BACKENDS:
        raise ValueError(f"{ENV_BACKEND}={backend!r}: use one of {', '.join(BACKENDS)}")
    if backend == "torch":
        return ReferenceKernels(fmt, f"{ENV_BACKEND}=torch")
    if device_type != "cpu":
        return _fall_back(fmt, f"there is no kernel for device {device_type!r}")
    try:
        found = cpu_kernels.load(fmt, head_size)
    except JitError as error:
        return _fall_back(fmt, str(error))
    try:  # also what was found: a build that failed here may have left its artifact for the next process
        selfcheck.check(found, fmt, head_size)
    except selfcheck.KernelMismatch as error:
        return _fall_back(fmt, f"{found.report.arch} {found.report.digest}: {error}")
    return found


def _fall_back(fmt: Format, reason: str) -> Kernels:
    log.warning("the PyTorch path serves format %s, many times slower than a kernel: %s", fmt.name, reason)
    return ReferenceKernels(fmt, reason)
