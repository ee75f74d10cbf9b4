"""`encode` and `decode`: plain vectors `[N, D]` in a named format, with no cache around them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from manthanquant import formats
from manthanquant.codebook import lloyd_max, midpoints
from manthanquant.cuda import vectors as vectors_cuda
from manthanquant.packing import pack_bitstream, unpack_bitstream
from manthanquant.quantize import dequantize, quantize
from manthanquant.transform import hadamard_transform

_SUM_BLOCK = 256


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
    Hadamard rotation. Raises `ValueError` for another shape or dtype, or where `x` holds NaN, an infinity or,
    for `seed3`, a vector whose squared norm overflows fp32 (the message names the first such row), and `FormatError`
    for an unknown format. On a GPU, `seed3` takes one kernel and the check of its result.
    """
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x: expected [N, D] with D > 0, got shape {tuple(x.shape)}: reshape it to two dimensions")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x: dtype {x.dtype} is not supported: use bfloat16, float16 or float32")
    fmt = formats.get(format)
    if isinstance(fmt, formats.SeedFormat):
        codes, scales = vectors_cuda.encode(x) if x.is_cuda else encode_seed_reference(x)
        _check_finite(scales.view(torch.float32), "an infinity, or its squared norm is beyond fp32")
        return Encoded(fmt.name, x.shape[1], codes, scales, x.dtype)
    _check_finite(x, "an infinity")
    y = hadamard_transform(fmt, "key", x.shape[1]).apply(x[:, None])[:, 0]
    coded = quantize(y, fmt, "key")
    parts = zip(fmt.key_bits, coded.codes.split(fmt.segments("key", x.shape[1]), 1))
    codes = torch.cat([pack_bitstream(part, bits) for bits, part in parts], 1)
    return Encoded(fmt.name, x.shape[1], codes, coded.scale_bytes, x.dtype)


def decode(encoded: Encoded) -> Tensor:
    """Vectors `[N, D]` in the dtype that was encoded."""
    fmt = formats.get(encoded.format)
    if isinstance(fmt, formats.SeedFormat):
        if encoded.codes.is_cuda:
            return vectors_cuda.decode(encoded.codes, encoded.scales, encoded.head_size, encoded.dtype)
        return decode_seed_reference(encoded.codes, encoded.scales, encoded.head_size).to(encoded.dtype)
    codes, first = [], 0
    for bits, size in zip(fmt.key_bits, fmt.segments("key", encoded.head_size)):
        width = -(-size * bits // 32) * 4
        codes.append(unpack_bitstream(encoded.codes[:, first : first + width], bits, size))
        first += width
    y = dequantize(torch.cat(codes, 1), encoded.scales, fmt, "key")
    return hadamard_transform(fmt, "key", encoded.head_size).undo(y[:, None])[:, 0].to(encoded.dtype)


def _check_finite(rows: Tensor, what: str) -> None:
    finite = torch.isfinite(rows).all(1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise ValueError(f"x: row {row} holds NaN or {what}: remove such rows before encoding")


def encode_seed_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """The seed format in PyTorch: codes uint8 `[N, code bytes]` and radius bytes uint8 `[N, 4]`.

    A code is the Lloyd-Max cell of an element of `x sqrt(D) / |x|`, the radius |x| in fp32.

    Every step is one IEEE fp32 operation and `_square` fixes the order of the sum, so a kernel can match all bits.
    """
    x, fmt = x.float(), formats.SEED3
    boundaries = torch.tensor(midpoints(lloyd_max(fmt.bits)), dtype=torch.float32, device=x.device)
    radius = _square(x).double().sqrt().float()  # some CPU libraries' fp32 root is not IEEE's
    unit = x * (torch.tensor(math.sqrt(x.shape[1]), dtype=torch.float32, device=x.device) / radius.clamp_min(1e-30))
    codes = torch.bucketize(unit.contiguous(), boundaries).to(torch.uint8)
    return pack_bitstream(codes, fmt.bits), radius.view(torch.uint8).view(x.shape[0], fmt.radius_bytes)


def _square(x: Tensor) -> Tensor:
    """|x|^2, fp32 `[N, 1]`: neighbours are added until one is left of each block of 256, then the blocks in order."""
    blocks = -(-x.shape[1] // _SUM_BLOCK)
    padding = blocks * _SUM_BLOCK - x.shape[1]
    squares = torch.nn.functional.pad(x * x, (0, padding)).view(-1, blocks, _SUM_BLOCK)
    while squares.shape[2] > 1:
        squares = squares[..., 0::2] + squares[..., 1::2]
    total = squares[:, 0]
    for block in squares[:, 1:].unbind(1):
        total = total + block
    return total


def decode_seed_reference(codes: Tensor, radius: Tensor, head_size: int) -> Tensor:
    """What `encode_seed_reference` coded, fp32 `[N, D]`."""
    bits = formats.SEED3.bits
    levels = torch.tensor(lloyd_max(bits), dtype=torch.float32, device=codes.device)
    index = unpack_bitstream(codes, bits, head_size).long()
    return levels[index] * (radius.contiguous().view(torch.float32) * head_size**-0.5)
