"""KV caches as an attention function sees them: keys and values go through a cache's codes and come back.

`Cache.attention` stands in for a model's own (`hf.Model.replaced`): every token's key and value is read as the cache
would hold it when the query at that position is decoded. For our formats that is `transform`, `quantize` and the exact
tiers with the product's own unit rounding, so what is measured is what is served. Others are simulated from their
published definition, all in fp32 with only the stored codes and scales rounded as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from manthanquant.codebook import lloyd_max, midpoints
from manthanquant.formats import SEED3, UNIT_TOKENS, Format, Side
from manthanquant.hf import AttentionCall, exact_attention
from manthanquant.quantize import dequantize, quantize
from manthanquant.reference import exact_units
from manthanquant.transform import LayerTransform, SideTransform, hadamard
from manthanquant.vectors import decode, encode

FP8_MAX = 448.0  # of e4m3; the engine's conversion saturates
TURBOQUANT_PRESETS = (("3bit_nc", 3, 3), ("k3v4_nc", 3, 4), ("4bit_nc", 4, 4), ("k8v4", 8, 4))  # key, value bits
TURBOQUANT_EXACT_LAYERS = 2  # at each end, as vLLM keeps for these presets in dense models

Coder = Callable[[Tensor], Tensor]  # [KV heads, T, D] -> the same, as read back


@dataclass(frozen=True)
class Cache:
    """One way to hold keys and values.

    Attributes:
        name: as shown.
        pair_bytes: bytes of a token's K+V pair of one head, by head size; exact layers and the hot pool left out.
        code: a call's keys and values as read back from codes.
        sink_tokens, recent_tokens: the exact tiers; 0 for none.
        exact_layers: layers that are left uncompressed.
    """

    name: str
    pair_bytes: Callable[[int], float]
    code: Callable[[AttentionCall], tuple[Tensor, Tensor]]
    sink_tokens: int = 0
    recent_tokens: int = 0
    exact_layers: frozenset[int] = frozenset()

    def attention(self, call: AttentionCall) -> Tensor:
        """Attention of each query over coded tokens, and exact ones in the tiers: fp32 `[heads, T, D]`."""
        if call.layer in self.exact_layers:
            return exact_attention(call)
        if self.sink_tokens == self.recent_tokens == 0:
            key, value = self.code(call)
            return exact_attention(replace(call, key=key, value=value))
        return two_tier_attention(call, *self.code(call), self.sink_tokens, self.recent_tokens)


def two_tier_attention(
    call: AttentionCall, coded_key: Tensor, coded_value: Tensor, sink_tokens: int, recent_tokens: int
) -> Tensor:
    """The query at position i reads a sequence of i + 1 tokens, whose exact units `reference.exact_units` names.

    Neighbouring queries share the boundary of the recent tier, so a mixed copy of keys and values walks along: it is
    exact at first, and a unit takes its coded form when the boundary passes it.
    """
    heads, length, size = call.query.shape
    kv_heads = call.key.shape[0]
    output = torch.empty_like(call.query)
    key, value = call.key.clone(), call.value.clone()
    coded = exact_units(length, sink_tokens, recent_tokens)[0] * UNIT_TOKENS  # the sinks stay exact
    for boundary, group in groupby(range(length), lambda i: exact_units(i + 1, sink_tokens, recent_tokens)[1]):
        rows = list(group)
        first, last, boundary = rows[0], rows[-1] + 1, boundary * UNIT_TOKENS
        if boundary > coded:
            passed = slice(coded, boundary)
            key[:, passed], value[:, passed] = coded_key[:, passed], coded_value[:, passed]
            coded = boundary
        start, seen = call.visible(first, last)
        query = call.query[:, first:last].reshape(kv_heads, -1, size)
        scores = call.scores(query, key[:, start:last]).view(kv_heads, heads // kv_heads, last - first, -1)
        weight = scores.masked_fill_(~seen, -torch.inf).softmax(-1)
        read = weight.view(kv_heads, -1, last - start) @ value[:, start:last]
        output[:, first:last] = read.view(heads, last - first, size)
    return output


def coded_cache(
    name: str, fmt: Format, layers: Callable[[int, int], LayerTransform], sink_tokens: int, recent_tokens: int
) -> Cache:
    """One of our formats; `layers(index, head size)` gives the transforms."""

    def code(call: AttentionCall) -> tuple[Tensor, Tensor]:
        layer = layers(call.layer, call.key.shape[-1]).to(call.key.device)
        return _through(call.key, fmt, "key", layer.key), _through(call.value, fmt, "value", layer.value)

    return Cache(name, fmt.token_bytes, code, sink_tokens, recent_tokens)


def _through(x: Tensor, fmt: Format, side: Side, transform: SideTransform) -> Tensor:
    coded = quantize(transform.apply(x.transpose(0, 1)), fmt, side)
    return transform.undo(dequantize(coded.codes, coded.scale_bytes, fmt, side)).transpose(0, 1)


def fp8_cache() -> Cache:
    """The engine's fp8: e4m3, scale 1."""
    return _plain_cache("fp8 (e4m3)", lambda size: 2.0 * size, fp8, fp8)


def seed_cache() -> Cache:
    """The seed system's format on both sides."""

    def code(x: Tensor) -> Tensor:
        return decode(encode(x.reshape(-1, x.shape[-1]), SEED3.name)).view(x.shape)

    return _plain_cache(SEED3.name, lambda size: float(SEED3.token_bytes(size)), code, code)


def turboquant_caches(layers: int) -> list[Cache]:
    """vLLM's presets: keys Hadamard, Lloyd-Max and norm correction, or fp8; values min-max; the end layers exact."""
    ends = range(min(TURBOQUANT_EXACT_LAYERS, layers // 2))
    exact = frozenset([*ends, *(layers - 1 - i for i in ends)])
    caches = []
    for name, key_bits, value_bits in TURBOQUANT_PRESETS:
        key = fp8 if key_bits == 8 else partial(norm_corrected, bits=key_bits)
        size = partial(_turboquant_bytes, key_bits, value_bits)
        caches.append(_plain_cache(f"turboquant_{name}", size, key, partial(min_max, bits=value_bits), exact))
    return caches


def _turboquant_bytes(key_bits: int, value_bits: int, head_size: int) -> float:
    key_scales = 0 if key_bits == 8 else 2
    value_scales = 4  # step and least
    return (key_bits + value_bits) * head_size / 8 + key_scales + value_scales


def _plain_cache(
    name: str,
    pair_bytes: Callable[[int], float],
    key: Coder,
    value: Coder,
    exact_layers: frozenset[int] = frozenset(),
) -> Cache:
    return Cache(name, pair_bytes, lambda call: (key(call.key), value(call.value)), exact_layers=exact_layers)


def fp8(x: Tensor) -> Tensor:
    """`x` through e4m3 at scale 1, saturating."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype)


def norm_corrected(x: Tensor, bits: int) -> Tensor:
    """Hadamard, Lloyd-Max codes of the unit vector, read back as |x| (fp16) times the unit vector of the levels."""
    size = x.shape[-1]
    rotation = hadamard(size).to(x)
    norm = x.norm(dim=-1, keepdim=True)
    levels = torch.tensor(lloyd_max(bits), dtype=x.dtype, device=x.device)
    boundaries = torch.tensor(midpoints(lloyd_max(bits)), dtype=x.dtype, device=x.device)
    unit = (x / (norm + 1e-8)) @ rotation * size**0.5
    picked = levels[torch.bucketize(unit.contiguous(), boundaries)]
    return norm.half().to(x.dtype) * (picked / picked.norm(dim=-1, keepdim=True)) @ rotation


def min_max(x: Tensor, bits: int) -> Tensor:
    """Uniform steps between the least and the greatest element; step and least are stored in fp16."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-8)
    code = ((x - low) / step + 0.5).floor().clamp(0, 2**bits - 1)
    return code * step.half().to(x.dtype) + low.half().to(x.dtype)
