"""Reading single tokens back from the pages: what the statistics compare with what was written."""

from __future__ import annotations

from torch import Tensor

from manthanquant.formats import SIDES, UNIT_TOKENS, Format
from manthanquant.packing import pages_as_units, unpack_units
from manthanquant.quantize import dequantize
from manthanquant.transform import LayerTransform


def read_tokens(
    cache: Tensor, slots: Tensor, fmt: Format, transform: LayerTransform, head_size: int
) -> tuple[Tensor, Tensor]:
    """Key and value of the tokens at `slots` (int64 `[n]`, none negative), fp32 `[n, KV heads, D]`, no longer
    transformed."""
    units = pages_as_units(cache, fmt, head_size)
    page, offset = slots // cache.shape[2], slots % cache.shape[2]
    data = units[page, :, offset // UNIT_TOKENS]  # [n, KV heads, unit bytes]
    found = []
    for side, turn in zip(SIDES, (transform.key, transform.value)):
        codes, scale_bytes = unpack_units(data, fmt, side, head_size)
        index = (offset % UNIT_TOKENS)[:, None, None, None]
        codes = codes.take_along_dim(index, 2)[:, :, 0]
        scale_bytes = scale_bytes.take_along_dim(index, 2)[:, :, 0]
        found.append(turn.undo(dequantize(codes, scale_bytes, fmt, side)))
    return found[0], found[1]
