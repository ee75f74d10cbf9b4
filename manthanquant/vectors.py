"""`encode` and `decode`: plain vectors `[N, D]` in a named format, with no cache around them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from manthanquant import formats
from manthanquant.codebook import lloyd_max, midpoints
from manthanquant.packing import pack_bitstream, unpack_bitstream
from manthanquant.quantize import dequantize, quantize
from manthanquant.transform import hadamard_transform


@dataclass(frozen=True)
class Encoded:
    """Vectors in a format.

    Attributes:
        format: the format's name.
        head_size: D.
        codes: uint8 `[N, code bytes]`, one little-endian bit stream a vector.
        scales: uint8 `[N, scale bytes]`: the seed's fp32 radius, or the format's scales.
        dtype: of the vectors that went in, and of those that `decode` returns.
    """

    format: str
    head_size: int
    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.codes.numel() + self.scales.numel()

    @property
    def ratio(self) -> float:
        """Bytes of the vectors in their own dtype over `nbytes`; of 2-byte elements for wider ones."""
        count = self.codes.shape[0] * self.head_size * min(self.dtype.itemsize, 2)
        return count / self.nbytes if self.nbytes else float("nan")


def encode(x: Tensor, format: str = "seed3") -> Encoded:
    """Codes `x` `[N, D]`, bf16, fp16 or fp32, any strides, N = 0 allowed.

    `seed3` takes any D; the paged formats take their supported head sizes and code with the key side's bits behind a
    Hadamard rotation. Raises `ValueError` for another shape or dtype, or where `x` holds NaN or an infinity (the
    message names the first such row), and `FormatError` for an unknown format.
    """
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x: expected [N, D] with D > 0, got shape {tuple(x.shape)}: reshape it to two dimensions")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x: dtype {x.dtype} is not supported: use bfloat16, float16 or float32")
    fmt = formats.get(format)
    finite = torch.isfinite(x).all(1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise ValueError(f"x: row {row} holds NaN or an infinity: remove such rows before encoding")
    if isinstance(fmt, formats.SeedFormat):
        codes, scales = _encode_seed(x.float(), fmt)
        return Encoded(fmt.name, x.shape[1], codes, scales, x.dtype)
    y = hadamard_transform(fmt, "key", x.shape[1]).apply(x[:, None])[:, 0]
    coded = quantize(y, fmt, "key")
    parts = zip(fmt.key_bits, coded.codes.split(fmt.segments("key", x.shape[1]), 1))
    codes = torch.cat([pack_bitstream(part, bits) for bits, part in parts], 1)
    return Encoded(fmt.name, x.shape[1], codes, coded.scale_bytes, x.dtype)


def decode(encoded: Encoded) -> Tensor:
    """Vectors `[N, D]` in the dtype that was encoded."""
    fmt = formats.get(encoded.format)
    if isinstance(fmt, formats.SeedFormat):
        return _decode_seed(encoded, fmt).to(encoded.dtype)
    codes, first = [], 0
    for bits, size in zip(fmt.key_bits, fmt.segments("key", encoded.head_size)):
        width = -(-size * bits // 32) * 4
        codes.append(unpack_bitstream(encoded.codes[:, first : first + width], bits, size))
        first += width
    y = dequantize(torch.cat(codes, 1), encoded.scales, fmt, "key")
    return hadamard_transform(fmt, "key", encoded.head_size).undo(y[:, None])[:, 0].to(encoded.dtype)


def _encode_seed(x: Tensor, fmt: formats.SeedFormat) -> tuple[Tensor, Tensor]:
    """Radius |x| in fp32, and the Lloyd-Max cell of each element of `x sqrt(D) / |x|`.

    The squares are summed in fp64, so that the rounded radius does not depend on the order of the sum and a kernel can
    match this bit by bit; the factor is one fp32 division, the product one fp32 multiplication.
    """
    boundaries = torch.tensor(midpoints(lloyd_max(fmt.bits)), device=x.device)
    radius = x.double().square().sum(1, keepdim=True).sqrt().float()
    unit = x * (torch.tensor(math.sqrt(x.shape[1]), device=x.device) / radius.clamp_min(1e-30))
    codes = torch.bucketize(unit.contiguous(), boundaries).to(torch.uint8)
    return pack_bitstream(codes, fmt.bits), radius.view(torch.uint8).view(x.shape[0], fmt.radius_bytes)


def _decode_seed(encoded: Encoded, fmt: formats.SeedFormat) -> Tensor:
    levels = torch.tensor(lloyd_max(fmt.bits), device=encoded.codes.device)
    codes = unpack_bitstream(encoded.codes, fmt.bits, encoded.head_size).long()
    radius = encoded.scales.contiguous().view(torch.float32)
    return levels[codes] * (radius / math.sqrt(encoded.head_size))
