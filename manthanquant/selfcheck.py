"""Kernels against the reference on a small case, on the machine that will run them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manthanquant import reference
from manthanquant.formats import (
    KERNEL_ATTENTION_ERROR,
    KERNEL_CODE_MISMATCHES,
    SIDES,
    UNIT_TOKENS,
    Format,
)
from manthanquant.packing import pages_as_units, unpack_units
from manthanquant.reference import HotPool
from manthanquant.transform import LayerTransform, hadamard_transform

_KV_HEADS, _HEADS, _PAGE_TOKENS = 2, 6, 32
_LENGTHS, _NEW = (20, 75), (1, 5)
_SINKS, _RECENT = 4, 20


class KernelMismatch(RuntimeError):
    """A kernel disagrees with the reference by more than `formats` allows; the text names the first place."""


def check(kernels: Any, fmt: Format, head_size: int, device: torch.device | str = "cpu") -> float:
    """Runs store and attention of `kernels` (see `ops.Kernels`) beside the reference, with hot tier, window and mean.

    Returns the largest relative error of an attention output; raises `KernelMismatch`.
    """
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(device)

    tokens = sum(_LENGTHS)
    pages_each = [-(-length // _PAGE_TOKENS) for length in _LENGTHS]
    pages = sum(pages_each) + 1
    order = torch.randperm(pages, generator=generator).int()
    table = torch.zeros(len(_LENGTHS), max(pages_each), dtype=torch.int32)
    slots = []
    for row, (length, first) in enumerate(zip(_LENGTHS, (0, pages_each[0]))):
        table[row, : pages_each[row]] = order[first : first + pages_each[row]]
        position = torch.arange(length)
        slots.append(table[row, position // _PAGE_TOKENS].long() * _PAGE_TOKENS + position % _PAGE_TOKENS)
    slot_mapping = torch.cat(slots).to(device)
    table = table.to(device)

    mean = random(_KV_HEADS, head_size)
    transform = LayerTransform(
        hadamard_transform(fmt, "key", head_size, mean), hadamard_transform(fmt, "value", head_size)
    ).to(device)
    key, value = random(tokens, _KV_HEADS, head_size) + mean, random(tokens, _KV_HEADS, head_size)
    units = pages * _PAGE_TOKENS // UNIT_TOKENS
    slot = torch.arange(units, dtype=torch.int32, device=device)  # every unit has a copy; few are read
    hot_slots = slot_mapping.clone()

    def pool() -> HotPool:
        shape = (units, _KV_HEADS, UNIT_TOKENS, head_size)
        key, value = (torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in SIDES)
        return HotPool(key, value, slot)

    shape = (pages, _KV_HEADS, _PAGE_TOKENS, fmt.token_bytes(head_size))
    expected, found = (torch.zeros(shape, dtype=torch.uint8, device=device) for _ in range(2))
    expected_hot, found_hot = pool(), pool()
    reference.store(key, value, expected, slot_mapping, fmt, transform, expected_hot, hot_slots)
    kernels.store(key, value, found, slot_mapping, transform, found_hot, hot_slots)
    compare_codes(found, expected, fmt, head_size)
    for name in ("key", "value"):
        if not torch.equal(getattr(found_hot, name), getattr(expected_hot, name)):
            raise KernelMismatch(f"store: the exact {name} copies differ")

    lengths = torch.tensor(_LENGTHS, dtype=torch.int32, device=device)
    starts = torch.tensor([0, _NEW[0], sum(_NEW)], dtype=torch.int32, device=device)
    query = random(sum(_NEW), _HEADS, head_size)
    worst = 0.0
    for window, soft_cap in ((None, None), (40, 30.0)):
        for hot in (None, expected_hot):
            options = {"window": window, "soft_cap": soft_cap, "hot": hot}
            options |= {"sink_tokens": _SINKS, "recent_tokens": _RECENT}
            inputs = (query, expected, table, lengths, starts)
            scale = head_size**-0.5
            want = reference.attention(*inputs, fmt, transform, scale, **options)  # type: ignore[arg-type]
            worst = max(worst, compare_outputs(kernels.attention(*inputs, transform, scale, **options), want))
    return worst


def compare_codes(found: Tensor, expected: Tensor, fmt: Format, head_size: int) -> None:
    """Two caches, code by code. Raises `KernelMismatch`."""
    for side in SIDES:
        (codes, scales), (codes_want, scales_want) = (
            unpack_units(pages_as_units(cache, fmt, head_size), fmt, side, head_size) for cache in (found, expected)
        )
        step = (codes.int() - codes_want.int()).abs()
        if bool((step > 1).any()) or float((step > 0).float().mean()) > KERNEL_CODE_MISMATCHES:
            page, head, unit, token, channel = (int(i) for i in (step > 0).nonzero()[0])
            raise KernelMismatch(
                f"store: {int((step > 0).sum())} of {step.numel()} {side} codes differ, first at page {page}, KV head "
                f"{head}, unit {unit}, token {token}, channel {channel}: "
                f"{int(codes[page, head, unit, token, channel])}, expected "
                f"{int(codes_want[page, head, unit, token, channel])}"
            )
        # Where no code differs, the scale's bit pattern (one fp16, or two e4m4) is the same up to its last place.
        same = (step == 0).all(-1)
        if len(fmt.bits(side)) == 1:
            scales, scales_want = (x.contiguous().view(torch.int16) for x in (scales, scales_want))
        gap = (scales.int() - scales_want.int()).abs()[same]
        if bool((gap > 1).any()):
            raise KernelMismatch(f"store: {int((gap > 1).sum())} of {gap.numel()} {side} scales differ")


def compare_outputs(found: Tensor, expected: Tensor) -> float:
    """The largest relative L2 error of a vector `[tokens, heads, D]`. Raises `KernelMismatch`."""
    error = (found.float() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-20)
    worst = float(error.max())
    if not worst <= KERNEL_ATTENTION_ERROR:  # also NaN
        bad = ~(error <= KERNEL_ATTENTION_ERROR)
        token, head = (int(i) for i in bad.nonzero()[0])
        raise KernelMismatch(
            f"attention: relative error {float(error[token, head]):.2g} at token {token}, head {head} "
            f"({int(bad.sum())} of {bad.numel()} outputs), at most {KERNEL_ATTENTION_ERROR} is allowed"
        )
    return worst
