"""Dense attention of ragged requests by its definition, in fp32: what FlashAttention is asked for."""

from __future__ import annotations

import math
from itertools import pairwise, starmap

import torch
from torch import Tensor


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_starts: Tensor,
    key_starts: Tensor,
    max_queries: int,
    max_keys: int,
    scale: float,
    causal: bool,
    left: int | None,
    soft_cap: float | None,
    out: Tensor,
) -> Tensor:
    """See `manthanquant.cuda.prefill.DenseAttention`."""
    heads, kv_heads = query.shape[1], key.shape[1]
    sums = torch.full((heads, query.shape[0]), -math.inf, device=query.device)
    q_starts, k_starts = query_starts.tolist(), key_starts.tolist()
    assert q_starts[-1] == query.shape[0] and k_starts[-1] == key.shape[0]
    for rows, keys in zip(starmap(slice, pairwise(q_starts)), starmap(slice, pairwise(k_starts)), strict=True):
        assert rows.stop - rows.start <= max_queries and keys.stop - keys.start <= max_keys
        q = query[rows].float().unflatten(1, (kv_heads, heads // kv_heads))
        k, v = key[keys].float(), value[keys].float()
        score = torch.einsum("mhgd,lhd->hgml", q, k) * scale
        if soft_cap is not None:
            score = soft_cap * torch.tanh(score / soft_cap)
        m, n = score.shape[2:]
        # Key j lies this far before the key that query i of a causal call sees last.
        distance = torch.arange(m, device=q.device)[:, None] + n - m - torch.arange(n, device=q.device)
        hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
        if left is not None:
            hidden = hidden | (distance > left)
        score = score.masked_fill(hidden, -math.inf)
        sums[:, rows] = score.logsumexp(-1).flatten(0, 1)
        weight = score.softmax(-1).nan_to_num() if n else score
        out[rows] = torch.einsum("hgml,lhd->mhgd", weight, v).flatten(1, 2).to(out.dtype)
    return sums
