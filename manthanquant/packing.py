"""Codes and scales to the bytes of units and back, in PyTorch: the oracle of every kernel's addressing.

The positions come from `formats.code_bits`; here they become index tensors. At 4 bits the stored nibble is
sign-magnitude (bit 3 set: negative; bits 0-2: the level's rank by magnitude), because a byte permute looks up eight
magnitudes and a second one applies the sign.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from manthanquant.formats import SIDES, UNIT_TOKENS, Format, Side, code_bits, scale_position


@cache
def _bit_index(
    fmt: Format, side: Side, head_size: int, device: torch.device
) -> list[tuple[slice, int, Tensor, Tensor]]:
    """For each class: its channels, its bits, and the word index and shift `[16, channels, bits]` of each bit."""
    table, first, out = code_bits(fmt, side, head_size), 0, []
    for bits, count in zip(fmt.bits(side), fmt.segments(side, head_size)):
        place = torch.tensor([row[first : first + count] for row in table], device=device)
        out.append((slice(first, first + count), bits, place[..., 0], place[..., 1]))
        first += count
    return out


@cache
def _scale_index(fmt: Format, side: Side, head_size: int, device: torch.device) -> Tensor:
    first = [scale_position(fmt, side, token, head_size) for token in range(UNIT_TOKENS)]
    return torch.tensor([[x, x + 1] for x in first], device=device)


def _to_nibble(codes: Tensor) -> Tensor:
    return torch.where(codes < 8, 15 - codes, codes - 8)


def _from_nibble(nibbles: Tensor) -> Tensor:
    return torch.where(nibbles < 8, nibbles + 8, 15 - nibbles)


def pack_units(codes: dict[Side, Tensor], scale_bytes: dict[Side, Tensor], fmt: Format) -> Tensor:
    """Whole units to bytes.

    Args:
        codes: a side each, uint8 `[..., 16, D]`.
        scale_bytes: a side each, uint8 `[..., 16, 2]`.

    Returns:
        uint8 `[..., unit_bytes]`.
    """
    key = codes["key"]
    *batch, _, head_size = key.shape
    units, device = key[..., 0, 0].numel(), key.device
    words = torch.zeros(units, fmt.scale_offset(head_size) // 4, dtype=torch.int64, device=device)
    out = torch.zeros(units, fmt.unit_bytes(head_size), dtype=torch.uint8, device=device)
    for side in SIDES:
        flat = codes[side].reshape(units, UNIT_TOKENS, head_size).long()
        for channels, bits, word, shift in _bit_index(fmt, side, head_size, device):
            part = flat[..., channels]
            part = _to_nibble(part) if bits == 4 else part
            bit = (part[..., None] >> torch.arange(bits, device=device)) & 1
            words.scatter_add_(1, word.reshape(1, -1).expand(units, -1), (bit << shift).reshape(units, -1))
        where = _scale_index(fmt, side, head_size, device)
        out[:, where.reshape(-1)] = scale_bytes[side].reshape(units, -1)
    low = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    out[:, : fmt.scale_offset(head_size)] = low.view(torch.uint8).view(units, -1)
    return out.view(*batch, -1)


def unpack_units(data: Tensor, fmt: Format, side: Side, head_size: int) -> tuple[Tensor, Tensor]:
    """Unit bytes `[..., unit_bytes]` -> codes uint8 `[..., 16, D]` and scale bytes uint8 `[..., 16, 2]` of a side."""
    *batch, size = data.shape
    flat = data.reshape(-1, size)
    words = flat[:, : fmt.scale_offset(head_size)].contiguous().view(torch.int32)
    codes = torch.empty(flat.shape[0], UNIT_TOKENS, head_size, dtype=torch.uint8, device=data.device)
    for channels, bits, word, shift in _bit_index(fmt, side, head_size, data.device):
        value = (words[:, word[..., 0]] >> shift[..., 0]) & 1
        for k in range(1, bits):
            value = value | (((words[:, word[..., k]] >> shift[..., k]) & 1) << k)
        codes[..., channels] = (_from_nibble(value) if bits == 4 else value).to(torch.uint8)
    scales = flat[:, _scale_index(fmt, side, head_size, data.device)]
    return codes.view(*batch, UNIT_TOKENS, head_size), scales.view(*batch, UNIT_TOKENS, 2)


def pack_bitstream(codes: Tensor, bits: int) -> Tensor:
    """The seed's layout: codes uint8 `[N, D]` as one little-endian bit stream, padded to whole 32-bit words.

    Code i occupies bits `bits * i` onwards, so a code may straddle two words. Returns uint8 `[N, bytes]`.
    """
    count, size = codes.shape
    total = -(-size * bits // 32) * 32
    stream = torch.zeros(count, total, dtype=torch.uint8, device=codes.device)
    stream[:, : size * bits] = ((codes[..., None] >> torch.arange(bits, device=codes.device)) & 1).flatten(1)
    weights = 1 << torch.arange(8, device=codes.device)
    return (stream.view(count, total // 8, 8) * weights).sum(-1).to(torch.uint8)


def unpack_bitstream(data: Tensor, bits: int, head_size: int) -> Tensor:
    """Inverse of `pack_bitstream`: uint8 `[N, bytes]` -> codes uint8 `[N, D]`."""
    stream = (data[..., None] >> torch.arange(8, device=data.device)) & 1
    stream = stream.flatten(1)[:, : head_size * bits].view(data.shape[0], head_size, bits)
    return (stream << torch.arange(bits, device=data.device)).sum(-1).to(torch.uint8)


def pages_as_units(cache: Tensor, fmt: Format, head_size: int) -> Tensor:
    """A cache uint8 `[pages, KV heads, page tokens, token bytes]` -> a view `[pages, KV heads, units, unit_bytes]`.

    The last two dimensions must be contiguous (they are one run of units); raises `ValueError` otherwise.
    """
    pages, heads, tokens, size = cache.shape
    if cache.stride(3) != 1 or cache.stride(2) != size or size != fmt.token_bytes(head_size) or tokens % UNIT_TOKENS:
        raise ValueError(
            f"cache of shape {tuple(cache.shape)} and strides {cache.stride()} is no run of {fmt.name} units: "
            f"need [pages, KV heads, a multiple of {UNIT_TOKENS} tokens, {fmt.token_bytes(head_size)}], "
            f"tokens contiguous"
        )
    unit = fmt.unit_bytes(head_size)
    return cache.as_strided(
        (pages, heads, tokens // UNIT_TOKENS, unit), (cache.stride(0), cache.stride(1), unit, 1), cache.storage_offset()
    )
