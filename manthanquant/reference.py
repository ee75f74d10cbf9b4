"""Store and attention over a coded cache in plain PyTorch: the oracle of every kernel, and the fallback.

Everything runs in fp32. Shapes, for T new tokens of n requests:

* `key`, `value` `[T, KV heads, D]`, `query` `[T, heads, D]`, any float dtype and strides; heads are grouped, so query
  head h reads KV head `h // (heads // KV heads)`.
* `cache` uint8 `[pages, KV heads, page tokens, token bytes]`, a run of units a page and head (see `formats`).
* `slot_mapping` int64 `[T]`: page * page tokens + offset, or -1 for a token to skip.
* `block_table` int32 `[n, most pages]`, `seq_lens` int32 `[n]` (new tokens included), `query_start_loc` int32
  `[n + 1]`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from manthanquant.formats import SIDES, UNIT_TOKENS, Format, Side
from manthanquant.packing import pack_units, pages_as_units, unpack_units
from manthanquant.quantize import dequantize, quantize
from manthanquant.transform import LayerTransform


class HotPool(NamedTuple):
    """Exact copies of some units, and where they are.

    Attributes:
        key, value: bf16 `[slots, KV heads, 16, D]`, as the model made them (no transform, no mean taken off).
        slot: int32 `[units]`, unit = page * units a page + unit in page: the slot that holds it, or -1.
    """

    key: Tensor
    value: Tensor
    slot: Tensor


def store(
    key: Tensor,
    value: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    fmt: Format,
    transform: LayerTransform,
    hot: HotPool | None = None,
    hot_slots: Tensor | None = None,
) -> int:
    """Codes new tokens into the cache; copies those with a hot slot (`slot * 16 + offset`, else -1) exactly.

    Returns how many vectors held NaN or an infinity; those are stored as zero, in the pool too.
    """
    count, head_size = slot_mapping.shape[0], key.shape[-1]
    keep = slot_mapping >= 0
    slots = slot_mapping[keep]
    units = pages_as_units(cache, fmt, head_size)
    per_page = units.shape[2]
    unit, place = torch.unique(slots // UNIT_TOKENS, return_inverse=True)
    page, row = unit // per_page, unit % per_page
    old = units[page, :, row]  # [U, Hk, unit_bytes]
    codes: dict[Side, Tensor] = {}
    scale_bytes: dict[Side, Tensor] = {}
    bad = 0
    offset = slots % UNIT_TOKENS
    for side, x, t in zip(SIDES, (key, value), (transform.key, transform.value)):
        coded = quantize(t.apply(x[:count][keep]), fmt, side)
        codes[side], scale_bytes[side] = unpack_units(old, fmt, side, head_size)
        codes[side][place, :, offset] = coded.codes
        scale_bytes[side][place, :, offset] = coded.scale_bytes
        bad += int((~coded.finite).sum())
    units[page, :, row] = pack_units(codes, scale_bytes, fmt)
    if hot is not None and hot_slots is not None:
        copied = hot_slots >= 0
        where = hot_slots[copied]
        for pool, x in ((hot.key, key), (hot.value, value)):
            exact = x[:count][copied]
            exact = torch.where(torch.isfinite(exact).all(-1, keepdim=True), exact, 0.0)
            pool[where // UNIT_TOKENS, :, where % UNIT_TOKENS] = exact.to(pool.dtype)
    return bad


def read(cache: Tensor, pages: Tensor, length: int, fmt: Format, side: Side, head_size: int) -> Tensor:
    """The first `length` tokens of a request, dequantised but still transformed: fp32 `[length, KV heads, D]`."""
    units = pages_as_units(cache, fmt, head_size)
    index = torch.arange(-(-length // UNIT_TOKENS), device=cache.device)
    page = pages.long()[index // units.shape[2]]
    codes, scale_bytes = unpack_units(units[page, :, index % units.shape[2]], fmt, side, head_size)
    y = dequantize(codes, scale_bytes, fmt, side)  # [units, Hk, 16, D]
    return y.transpose(1, 2).reshape(-1, units.shape[1], head_size)[:length]


def exact_units(length: int, sink_tokens: int, recent_tokens: int) -> tuple[int, int]:
    """Which units of a sequence are read exactly where a copy is there: those below the first and from the second."""
    if recent_tokens <= 0:
        return -(-sink_tokens // UNIT_TOKENS), -(-length // UNIT_TOKENS)
    return -(-sink_tokens // UNIT_TOKENS), max(0, length - recent_tokens) // UNIT_TOKENS


def attention(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    fmt: Format,
    transform: LayerTransform,
    scale: float,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    sink_tokens: int = 0,
    recent_tokens: int = 0,
    hot: HotPool | None = None,
) -> Tensor:
    """Causal attention of new tokens over their requests' cached tokens, themselves included: fp32 `[T, heads, D]`.

    Query i of a request of `L` tokens and `m` new ones sits at position `L - m + i`. `window` is how many tokens a
    query sees, itself included. With `soft_cap` c, scores become `c tanh(score / c)`, for which the key mean's constant
    is added back. `sink_tokens` and `recent_tokens` name the units read exactly where `hot` holds a copy, by the length
    at the request's last new token.
    """
    tokens, heads, head_size = query.shape
    kv_heads, page_tokens = cache.shape[1], cache.shape[2]
    group = heads // kv_heads
    per_page = page_tokens // UNIT_TOKENS
    turned = transform.key.apply_to_query(query)
    out = torch.zeros(tokens, heads, head_size, dtype=torch.float32, device=query.device)
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for row, length in enumerate(lengths):
        first, last = starts[row], starts[row + 1]
        if first == last:
            continue
        keys = read(cache, block_table[row], length, fmt, "key", head_size)
        values = read(cache, block_table[row], length, fmt, "value", head_size)
        if hot is not None:
            token = torch.arange(length, device=cache.device)
            unit = token // UNIT_TOKENS
            below, above = exact_units(length, sink_tokens, recent_tokens)
            slot = hot.slot[block_table[row].long()[unit // per_page] * per_page + unit % per_page].long()
            exact = ((unit < below) | (unit >= above)) & (slot >= 0)
            where = (slot[exact], slice(None), token[exact] % UNIT_TOKENS)
            keys[exact] = transform.key.apply(hot.key[where])
            values[exact] = transform.value.apply(hot.value[where])
        q = turned[first:last].view(last - first, kv_heads, group, head_size)
        score = torch.einsum("mhgd,lhd->hgml", q, keys) * scale
        if soft_cap is not None:
            if transform.key.mean is not None:
                raw = query[first:last].float().view(last - first, kv_heads, group, head_size)
                score += torch.einsum("mhgd,hd->hgm", raw, transform.key.mean)[..., None] * scale
            score = soft_cap * torch.tanh(score / soft_cap)
        position = torch.arange(length, device=query.device)
        distance = position[length - (last - first) :, None] - position[None]
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        weight = score.masked_fill(hidden, -math.inf).softmax(-1)
        out[first:last] = torch.einsum("hgml,lhd->mhgd", weight, values).reshape(last - first, heads, head_size)
    return transform.value.undo_output(out)
