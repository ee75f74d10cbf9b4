"""Attention of a prefill chunk in PyTorch: its own keys and values exact, the tokens before it from the cache.

A chunk's queries mostly read the chunk itself, and its keys and values are at hand, exact: reading them back from codes
would only cost quality. Only the tokens before it, if any, are dequantised, with their exact copies where the hot tier
has them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from manthanquant import reference
from manthanquant.formats import UNIT_TOKENS, Format
from manthanquant.reference import HotPool
from manthanquant.transform import LayerTransform

QUERY_BLOCK = 512  # queries whose scores are in memory at once where the fused kernel cannot serve (soft cap)


def read_prefix(
    cache: Tensor,
    pages: Tensor,
    first: int,
    last: int,
    fmt: Format,
    transform: LayerTransform,
    head_size: int,
    hot: HotPool | None,
    sink_tokens: int,
    recent_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Tokens `first` to `last` of a request as the model made them, fp32 `[last - first, KV heads, D]` a side.

    `pages` is the request's row of the block table, int `[pages]`. Units are read exactly as `reference.attention`
    would at length `last`: a sink or inside the window, where the hot tier holds a copy.
    """
    page_tokens = cache.shape[2]
    start = first // page_tokens * page_tokens
    rows = pages[start // page_tokens : -(-last // page_tokens)].long()
    key = transform.key.undo(reference.read(cache, rows, last - start, fmt, "key", head_size))
    value = transform.value.undo(reference.read(cache, rows, last - start, fmt, "value", head_size))
    if hot is not None:
        token = torch.arange(start, last, device=cache.device)
        unit, per_page = token // UNIT_TOKENS, page_tokens // UNIT_TOKENS
        below, above = reference.exact_units(last, sink_tokens, recent_tokens)
        slot = hot.slot[rows[(token - start) // page_tokens] * per_page + unit % per_page].long()
        exact = ((unit < below) | (unit >= above)) & (slot >= 0)
        where = (slot[exact], slice(None), token[exact] % UNIT_TOKENS)
        key[exact], value[exact] = hot.key[where].float(), hot.value[where].float()
    return key[first - start :], value[first - start :]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Causal attention of the last tokens of a sequence.

    Args:
        query: `[m, heads, D]`, the last m of the L tokens.
        key, value: `[L, KV heads, D]`, same dtype as `query`.
        window: tokens a query sees, itself included; None for all before it.
        soft_cap: c of `c tanh(score / c)`; None for none.

    Returns:
        `[m, heads, D]` in `query`'s dtype.
    """
    m, length = query.shape[0], key.shape[0]
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    if soft_cap is not None:
        return _attend_capped(query, key, value, scale, window, soft_cap)
    if m == length and (window is None or window >= length):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    else:
        mask = visible(m, length, window, query.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def visible(m: int, length: int, window: int | None, device: torch.device | str = "cpu") -> Tensor:
    """bool `[m, length]`: which tokens each of the last m sees."""
    distance = torch.arange(length - m, length, device=device)[:, None] - torch.arange(length, device=device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _attend_capped(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, soft_cap: float
) -> Tensor:
    m, heads, size = query.shape
    length, kv_heads, _ = key.shape
    out = torch.empty_like(query)
    for first in range(0, m, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, m)
        seen = length - m + last  # tokens past the block's last query are hidden from all of it
        q = query[first:last].reshape(last - first, kv_heads, heads // kv_heads, size)
        score = torch.einsum("mhgd,lhd->hgml", q, key[:seen]).float() * scale
        score = soft_cap * torch.tanh(score / soft_cap)
        hidden = ~visible(last - first, seen, window, query.device)
        weight = score.masked_fill(hidden, -torch.inf).softmax(-1).to(value.dtype)
        out[first:last] = torch.einsum("hgml,lhd->mhgd", weight, value[:seen]).reshape(last - first, heads, size)
    return out
