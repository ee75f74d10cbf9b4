"""Vectors to codes and scales, and back. The scale makes inner products unbiased.

Each class of channels of a side is coded on its own: `c = codebook(y sqrt(n) / |y|)` and the scale
`s = |y|^2 / <y, c>` (EDEN, Vargaftik et al. 2022), so that `<y, s c> = |y|^2`. A vector that holds NaN or an infinity
is coded as zero (scale 0) and reported: one bad token must not spread to every later one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from manthanquant.codebook import codebook
from manthanquant.formats import E4M4_EXPONENT_BIAS, Format, Side

FP16_MAX = 65504.0


@dataclass(frozen=True)
class Coded:
    """Codes and scales of one side.

    Attributes:
        codes: uint8 `[..., D]`, indices of ascending levels.
        scale_bytes: uint8 `[..., 2]`: one little-endian fp16, or one e4m4 a class.
        finite: bool `[...]`: False where the vector was not finite and is coded as zero.
    """

    codes: Tensor
    scale_bytes: Tensor
    finite: Tensor


@cache
def _tables(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    book = codebook(bits)
    # The dtype is named because an engine that loads a model sets the default to the model's own.
    levels, boundaries = (torch.tensor(x, dtype=torch.float32, device=device) for x in (book.levels, book.boundaries))
    return levels, boundaries


def scales_to_bytes(scales: Tensor) -> Tensor:
    """Scales `[..., classes]`, fp32, non-negative -> uint8 `[..., 2]`; out of range saturates."""
    if scales.shape[-1] == 1:
        return scales.clamp(max=FP16_MAX).half().view(torch.uint8)
    # e4m4: round in fp16's own grid to 4 mantissa bits; the sum carries into the exponent as rounding should.
    pattern = (scales * 2.0**-E4M4_EXPONENT_BIAS).clamp(max=1.9375).half().view(torch.int16).int()
    return ((pattern + (1 << 5)) >> 6).clamp(max=255).to(torch.uint8)


def scales_from_bytes(scale_bytes: Tensor, classes: int) -> Tensor:
    """uint8 `[..., 2]` -> fp32 `[..., classes]`."""
    if classes == 1:
        return scale_bytes.contiguous().view(torch.float16).float()
    pattern = (scale_bytes.int() << 6).to(torch.int16)
    return pattern.view(torch.float16).float() * 2.0**E4M4_EXPONENT_BIAS


def quantize(y: Tensor, fmt: Format, side: Side) -> Coded:
    """Transformed vectors `[..., D]`, any float dtype -> `Coded`."""
    finite = torch.isfinite(y).all(-1)
    y = torch.where(finite[..., None], y.float(), 0.0)
    codes, scales = [], []
    for bits, part in zip(fmt.bits(side), y.split(fmt.segments(side, y.shape[-1]), -1)):
        levels, boundaries = _tables(bits, y.device)
        square = (part * part).sum(-1, keepdim=True)
        unit = part * (math.sqrt(part.shape[-1]) * torch.rsqrt(square.clamp_min(1e-38)))
        index = torch.bucketize(unit.contiguous(), boundaries)
        scales.append(square / (part * levels[index]).sum(-1, keepdim=True).clamp_min(1e-30))
        codes.append(index.to(torch.uint8))
    return Coded(torch.cat(codes, -1), scales_to_bytes(torch.cat(scales, -1)), finite)


def dequantize(codes: Tensor, scale_bytes: Tensor, fmt: Format, side: Side) -> Tensor:
    """Codes `[..., D]` and scale bytes `[..., 2]` -> fp32 `[..., D]`, still transformed."""
    segments = fmt.segments(side, codes.shape[-1])
    scales = scales_from_bytes(scale_bytes, len(segments))
    parts = [
        _tables(bits, codes.device)[0][part.long()] * scales[..., i : i + 1]
        for i, (bits, part) in enumerate(zip(fmt.bits(side), codes.split(segments, -1)))
    ]
    return torch.cat(parts, -1)
