"""What a write would be in our format, for the shadow mode: coded for real, read back where it is measured, dropped."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manthanquant import ops, vectors
from manthanquant.formats import UNIT_TOKENS, Format, SeedFormat
from manthanquant.transform import LayerTransform
from manthanquant.vllm_plugin import sampling


class Compressed(NamedTuple):
    """`errors`: vectors that held NaN or an infinity. `key`, `value`: the first tokens as stored, fp32 `[n, Hk, D]`."""

    errors: int
    key: Tensor
    value: Tensor


def compress_pages(
    key: Tensor, value: Tensor, kernels: ops.Kernels, fmt: Format, transform: LayerTransform, sampled: int
) -> Compressed:
    """Stores `[T, KV heads, D]` into a page of its own and reads the first `sampled` tokens back."""
    tokens, kv_heads, head_size = key.shape
    page_tokens = -(-max(tokens, 1) // UNIT_TOKENS) * UNIT_TOKENS
    page = torch.zeros(1, kv_heads, page_tokens, fmt.token_bytes(head_size), dtype=torch.uint8, device=key.device)
    slots = torch.arange(tokens, device=key.device)
    errors = kernels.store(key, value, page, slots, transform)
    return Compressed(errors, *sampling.read_tokens(page, slots[:sampled], fmt, transform, head_size))


def compress_vectors(key: Tensor, value: Tensor, fmt: SeedFormat, sampled: int) -> Compressed:
    """Codes each vector by itself, in the seed's layout. A vector that is not finite is coded as zero."""
    errors, stored = 0, []
    for x in (key, value):
        finite = x.isfinite().all(-1, keepdim=True)
        errors += int((~finite).sum())
        flat = torch.where(finite, x, 0).reshape(-1, x.shape[-1])
        encoded = vectors.encode(flat, fmt.name)
        head = sampled * x.shape[1]
        part = vectors.Encoded(
            encoded.format, encoded.head_size, encoded.codes[:head], encoded.scales[:head], encoded.dtype
        )
        stored.append(vectors.decode(part).float().view(-1, *x.shape[1:]))
    return Compressed(errors, *stored)
