"""Decode attention, whole calls, on four shapes, beside FlashAttention-3 and vLLM's turboquant."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from manthanquant.bench.inputs import random_cache, random_transform
from manthanquant.bench.result import OURS, Result
from manthanquant.bench.timing import Call, milliseconds
from manthanquant.cuda.decode import DecodeAttention, decode_transform
from manthanquant.formats import K3V3, K42V3, K42V42, SIDES, UNIT_TOKENS, Format
from manthanquant.reference import HotPool

HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
PAGE_TOKENS, SMALL_PAGE_TOKENS, PEER_PAGE_TOKENS = 64, 16, 16
RECENT_TOKENS, SINK_TOKENS = 128, 4
SCALE = HEAD_SIZE**-0.5
# Requests, tokens of each, and caches taken in turn so that no call finds its bytes in L2.
SHAPES = ((32, 16384, 1), (8, 32768, 2), (128, 2048, 2), (1, 131072, 4))
CALLS = 4


def run(peers: bool) -> Iterator[Result]:
    torch.manual_seed(0)
    for shape in SHAPES:
        for page_tokens in (PAGE_TOKENS, SMALL_PAGE_TOKENS):
            for fmt, kind in ((K3V3, "hadamard"), (K42V3, "gain"), (K42V42, "hadamard")):
                yield _ours(fmt, kind, shape, page_tokens)
        yield _ours(K42V42, "dense", shape, PAGE_TOKENS)
        yield _ours(K3V3, "hadamard", shape, PAGE_TOKENS, recent_tokens=RECENT_TOKENS)
        yield _ours(K42V3, "gain", shape, PAGE_TOKENS, recent_tokens=RECENT_TOKENS)
        if peers and importlib.util.find_spec("vllm"):
            yield _flash_attention("bf16", torch.bfloat16, shape)
            yield _flash_attention("fp8", torch.float8_e4m3fn, shape)
            yield _turboquant(shape, bits=3, key_bytes=50, value_bytes=52)
        torch.cuda.empty_cache()


def _case(shape: tuple[int, int, int]) -> str:
    requests, length, _ = shape
    return f"{requests} x {length:,} tokens, {HEADS} / {KV_HEADS} heads, D={HEAD_SIZE}"


def _query(requests: int) -> Tensor:
    return 1.5 * torch.randn(requests, HEADS, HEAD_SIZE, device="cuda").bfloat16()


def _tables(shape: tuple[int, int, int], page_tokens: int) -> Tensor:
    """Random pages, int32 `[caches, requests, pages of a request]`."""
    requests, length, caches = shape
    pages = caches * requests * length // page_tokens
    return torch.randperm(pages, device="cuda", dtype=torch.int32).view(caches, requests, -1)


def _ours(fmt: Format, kind: str, shape: tuple[int, int, int], page_tokens: int, recent_tokens: int = 0) -> Result:
    requests, length, caches = shape
    device, sinks = torch.device("cuda"), SINK_TOKENS if recent_tokens else 0
    tables = _tables(shape, page_tokens)
    cache = random_cache(fmt, (tables.numel(), KV_HEADS, page_tokens), HEAD_SIZE)
    hot, exact_bytes = _hot_pool(tables, length, page_tokens, recent_tokens) if recent_tokens else (None, 0)
    transform = decode_transform(random_transform(kind, fmt, KV_HEADS, HEAD_SIZE), fmt, HEAD_SIZE, device)
    attention = DecodeAttention(
        fmt, HEAD_SIZE, HEADS, KV_HEADS, max_requests=requests, exact=recent_tokens > 0, device=device
    )
    lengths = torch.full((requests,), length, dtype=torch.int32, device=device)
    calls: list[Call] = []
    for call in range(CALLS):
        query = _query(requests)
        calls.append(
            partial(
                attention,
                query,
                cache,
                tables[call % caches],
                lengths,
                transform,
                SCALE,
                hot=hot,
                sink_tokens=sinks,
                recent_tokens=recent_tokens,
                out=torch.empty_like(query),
            )
        )
    moved = requests * length * KV_HEADS * fmt.token_bytes(HEAD_SIZE) + exact_bytes
    tier = f", newest {recent_tokens} exact" if recent_tokens else ""
    subject = f"{OURS} {fmt.name} {kind}, pages of {page_tokens}{tier}"
    return Result("decode", _case(shape), subject, milliseconds(calls), moved)


def _hot_pool(tables: Tensor, length: int, page_tokens: int, recent_tokens: int) -> tuple[HotPool, int]:
    """A pool that holds every sink and recent unit of each request, and the bytes of one call's exact units."""
    per_page = page_tokens // UNIT_TOKENS
    logical = [0, *range(max(1, (length - recent_tokens) // UNIT_TOKENS), length // UNIT_TOKENS)]
    unit = torch.tensor(logical, device="cuda")
    physical = (tables[..., unit // per_page].long() * per_page + unit % per_page).flatten()
    slot = torch.full((tables.numel() * per_page,), -1, dtype=torch.int32, device="cuda")
    slot[physical] = torch.arange(len(physical), dtype=torch.int32, device="cuda")
    key, value = (torch.randn(len(physical), KV_HEADS, UNIT_TOKENS, HEAD_SIZE, device="cuda").bfloat16() for _ in SIDES)
    requests = tables.shape[1]
    return HotPool(key, value, slot), 2 * key[0].nbytes * len(logical) * requests


def _flash_attention(name: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> Result:
    """FlashAttention-3 as vLLM brings it, over pages of its default size."""
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    requests, length, caches = shape
    tables = _tables(shape, PEER_PAGE_TOKENS)
    key, value = (
        torch.randn(tables.numel(), PEER_PAGE_TOKENS, KV_HEADS, HEAD_SIZE, device="cuda").to(dtype) for _ in SIDES
    )
    starts = torch.arange(requests + 1, device="cuda", dtype=torch.int32)
    lengths = torch.full((requests,), length, dtype=torch.int32, device="cuda")
    scale = None if dtype == torch.bfloat16 else torch.ones(requests, KV_HEADS, device="cuda")
    calls: list[Call] = []
    for call in range(CALLS):
        query = _query(requests)
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
                block_table=tables[call % caches],
                softmax_scale=SCALE,
                causal=True,
                out=torch.empty_like(query),
                q_descale=scale,
                k_descale=scale,
                v_descale=scale,
                fa_version=3,
            )
        )
    moved = requests * length * KV_HEADS * HEAD_SIZE * 2 * key.element_size()
    return Result("decode", _case(shape), f"FlashAttention-3 {name}", milliseconds(calls), moved)


def _turboquant(shape: tuple[int, int, int], bits: int, key_bytes: int, value_bytes: int) -> Result:
    """vLLM's decode of `turboquant_{bits}bit_nc`, called as its backend calls it."""
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.v1.attention.backends.turboquant_attn import _build_hadamard
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention

    requests, length, caches = shape
    tables = _tables(shape, PEER_PAGE_TOKENS)
    slot = key_bytes + value_bytes
    cache = torch.zeros(tables.numel(), PEER_PAGE_TOKENS, KV_HEADS, slot, dtype=torch.uint8, device="cuda")
    centroids, rotation = get_centroids(HEAD_SIZE, bits).cuda(), _build_hadamard(HEAD_SIZE, "cuda")
    lengths = torch.full((requests,), length, dtype=torch.int32, device="cuda")
    calls: list[Call] = [
        partial(
            triton_turboquant_decode_attention,
            _query(requests),
            cache,
            tables[call % caches],
            lengths,
            rotation,
            centroids,
            SCALE,
            bits,
            key_bytes,
            bits,
            norm_correction=True,
            PiT=rotation.T.contiguous(),
            max_num_kv_splits=32,
        )
        for call in range(CALLS)
    ]
    moved = requests * length * KV_HEADS * slot
    return Result("decode", _case(shape), f"vLLM turboquant {bits}bit", milliseconds(calls), moved)
