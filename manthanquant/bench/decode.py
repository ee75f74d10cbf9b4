"""Decode attention, whole calls: lengths, formats, head sizes and groups, beside FlashAttention-3 and turboquant."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from manthanquant.bench.inputs import random_cache, random_transform
from manthanquant.bench.result import OURS, Result
from manthanquant.bench.timing import Call, milliseconds
from manthanquant.cuda.decode import DecodeAttention, decode_transform
from manthanquant.formats import K3V3, K4V4, K42V3, K42V42, SIDES, UNIT_TOKENS, Format
from manthanquant.reference import HotPool

PAGE_TOKENS, SMALL_PAGE_TOKENS, PEER_PAGE_TOKENS = 64, 16, 16
RECENT_TOKENS, SINK_TOKENS = 128, 4
DEFAULT = (K42V3, "dense")
TRANSFORMED = (DEFAULT, (K42V3, "gain"), (K3V3, "hadamard"))
CALLS = 4


@dataclass(frozen=True)
class Shape:
    """Requests of one length. `caches` are taken in turn, so that no call finds its bytes in L2."""

    requests: int
    length: int
    caches: int
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    query_tokens: int = 1

    def __str__(self) -> str:
        new = f" ({self.query_tokens} new)" if self.query_tokens > 1 else ""
        heads = f"{self.heads} / {self.kv_heads} heads, D={self.head_size}"
        return f"{self.requests} x {self.length:,} tokens{new}, {heads}"

    @property
    def scale(self) -> float:
        return float(self.head_size) ** -0.5


SHAPES = (Shape(32, 16384, 1), Shape(8, 32768, 2), Shape(128, 2048, 2), Shape(1, 131072, 4))
LONG, SHORT = SHAPES[0], SHAPES[2]
OTHER_SHAPES = (
    *(replace(shape, head_size=size) for size in (64, 80, 96, 256) for shape in (LONG, SHORT)),
    *(replace(LONG, heads=heads) for heads in (64, 128)),  # groups of 8 and 16
    replace(LONG, kv_heads=2),
    replace(LONG, query_tokens=4),
)


def run(peers: bool) -> Iterator[Result]:
    torch.manual_seed(0)
    for shape in SHAPES:
        for page_tokens in (PAGE_TOKENS, SMALL_PAGE_TOKENS):
            for fmt, kind in (*TRANSFORMED, (K42V42, "hadamard"), (K4V4, "hadamard")):
                yield _ours(fmt, kind, shape, page_tokens)
        for fmt, kind in TRANSFORMED:
            yield _ours(fmt, kind, shape, PAGE_TOKENS, recent_tokens=RECENT_TOKENS)
        if peers and importlib.util.find_spec("vllm"):
            yield _flash_attention("bf16", torch.bfloat16, shape)
            yield _flash_attention("fp8", torch.float8_e4m3fn, shape)
            yield _turboquant(shape, bits=3, key_bytes=50, value_bytes=52)
        torch.cuda.empty_cache()
    for shape in OTHER_SHAPES:
        yield _ours(*DEFAULT, shape, PAGE_TOKENS)
        torch.cuda.empty_cache()


def _query(shape: Shape) -> Tensor:
    size = (shape.requests * shape.query_tokens, shape.heads, shape.head_size)
    return 1.5 * torch.randn(size, device="cuda").bfloat16()


def _tables(shape: Shape, page_tokens: int) -> Tensor:
    """Random pages, int32 `[caches, requests, pages of a request]`."""
    pages = shape.caches * shape.requests * shape.length // page_tokens
    return torch.randperm(pages, device="cuda", dtype=torch.int32).view(shape.caches, shape.requests, -1)


def _ours(fmt: Format, kind: str, shape: Shape, page_tokens: int, recent_tokens: int = 0) -> Result:
    device, sinks = torch.device("cuda"), SINK_TOKENS if recent_tokens else 0
    tables = _tables(shape, page_tokens)
    size = shape.head_size
    cache = random_cache(fmt, (tables.numel(), shape.kv_heads, page_tokens), size)
    hot, exact_bytes = _hot_pool(tables, shape, page_tokens, recent_tokens) if recent_tokens else (None, 0)
    transform = decode_transform(random_transform(kind, fmt, shape.kv_heads, size), fmt, size, device)
    attention = DecodeAttention(
        fmt,
        size,
        shape.heads,
        shape.kv_heads,
        max_requests=shape.requests,
        query_tokens=shape.query_tokens,
        exact=recent_tokens > 0,
        device=device,
    )
    lengths = torch.full((shape.requests,), shape.length, dtype=torch.int32, device=device)
    calls: list[Call] = []
    for call in range(CALLS):
        query = _query(shape)
        calls.append(
            partial(
                attention,
                query,
                cache,
                tables[call % shape.caches],
                lengths,
                transform,
                shape.scale,
                hot=hot,
                sink_tokens=sinks,
                recent_tokens=recent_tokens,
                out=torch.empty_like(query),
            )
        )
    moved = shape.requests * shape.length * shape.kv_heads * fmt.token_bytes(size) + exact_bytes
    tier = f", newest {recent_tokens} exact" if recent_tokens else ""
    subject = f"{OURS} {fmt.name} {kind}, pages of {page_tokens}{tier}"
    return Result("decode", str(shape), subject, milliseconds(calls), moved)


def _hot_pool(tables: Tensor, shape: Shape, page_tokens: int, recent_tokens: int) -> tuple[HotPool, int]:
    """A pool that holds every sink and recent unit of each request, and the bytes of one call's exact units."""
    per_page = page_tokens // UNIT_TOKENS
    logical = [0, *range(max(1, (shape.length - recent_tokens) // UNIT_TOKENS), shape.length // UNIT_TOKENS)]
    unit = torch.tensor(logical, device="cuda")
    physical = (tables[..., unit // per_page].long() * per_page + unit % per_page).flatten()
    slot = torch.full((tables.numel() * per_page,), -1, dtype=torch.int32, device="cuda")
    slot[physical] = torch.arange(len(physical), dtype=torch.int32, device="cuda")
    size = (len(physical), shape.kv_heads, UNIT_TOKENS, shape.head_size)
    key, value = (torch.randn(size, device="cuda").bfloat16() for _ in SIDES)
    return HotPool(key, value, slot), 2 * key[0].nbytes * len(logical) * shape.requests


def _flash_attention(name: str, dtype: torch.dtype, shape: Shape) -> Result:
    """FlashAttention-3 as vLLM brings it, over pages of its default size."""
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    requests, length, size = shape.requests, shape.length, shape.head_size
    tables = _tables(shape, PEER_PAGE_TOKENS)
    key, value = (
        torch.randn(tables.numel(), PEER_PAGE_TOKENS, shape.kv_heads, size, device="cuda").to(dtype) for _ in SIDES
    )
    starts = torch.arange(requests + 1, device="cuda", dtype=torch.int32)
    lengths = torch.full((requests,), length, dtype=torch.int32, device="cuda")
    scale = None if dtype == torch.bfloat16 else torch.ones(requests, shape.kv_heads, device="cuda")
    calls: list[Call] = []
    for call in range(CALLS):
        query = _query(shape)
        calls.append(
            partial(
                flash_attn_varlen_func,
                query.to(dtype),
                key,
                value,
                max_seqlen_q=1,
                cu_seqlens_q=starts,
                max_seqlen_k=length,
                seqused_k=lengths,
                block_table=tables[call % shape.caches],
                softmax_scale=shape.scale,
                causal=True,
                out=torch.empty_like(query),
                q_descale=scale,
                k_descale=scale,
                v_descale=scale,
                fa_version=3,
            )
        )
    moved = requests * length * shape.kv_heads * size * 2 * key.element_size()
    return Result("decode", str(shape), f"FlashAttention-3 {name}", milliseconds(calls), moved)


def _turboquant(shape: Shape, bits: int, key_bytes: int, value_bytes: int) -> Result:
    """vLLM's decode of `turboquant_{bits}bit_nc`, called as its backend calls it."""
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.v1.attention.backends.turboquant_attn import _build_hadamard
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention

    requests, length, size = shape.requests, shape.length, shape.head_size
    tables = _tables(shape, PEER_PAGE_TOKENS)
    slot = key_bytes + value_bytes
    cache = torch.zeros(tables.numel(), PEER_PAGE_TOKENS, shape.kv_heads, slot, dtype=torch.uint8, device="cuda")
    centroids, rotation = get_centroids(size, bits).cuda(), _build_hadamard(size, "cuda")
    lengths = torch.full((requests,), length, dtype=torch.int32, device="cuda")
    calls: list[Call] = [
        partial(
            triton_turboquant_decode_attention,
            _query(shape),
            cache,
            tables[call % shape.caches],
            lengths,
            rotation,
            centroids,
            shape.scale,
            bits,
            key_bytes,
            bits,
            norm_correction=True,
            PiT=rotation.T.contiguous(),
            max_num_kv_splits=32,
        )
        for call in range(CALLS)
    ]
    moved = requests * length * shape.kv_heads * slot
    return Result("decode", str(shape), f"vLLM turboquant {bits}bit", milliseconds(calls), moved)
