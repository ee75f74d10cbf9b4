"""The store: a chunk of 8,192 tokens, and 32 single tokens of as many requests, beside vLLM's turboquant."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from manthanquant.bench.inputs import random_transform
from manthanquant.bench.result import OURS, Result
from manthanquant.bench.timing import milliseconds
from manthanquant.cuda import store as gpu
from manthanquant.formats import K3V3, K42V3, SIDES, Format

PAGE_TOKENS, KV_HEADS, HEAD_SIZE = 64, 8, 128
CHUNK, STEP = 8192, 32
SETS = 6  # of inputs, taken in turn
KINDS = ("hadamard", "gain", "dense")


def run(peers: bool) -> Iterator[Result]:
    torch.manual_seed(0)
    for tokens in (CHUNK, STEP):
        for fmt in (K3V3, K42V3):
            for kind in KINDS:
                yield _ours(fmt, kind, tokens)
    if peers and importlib.util.find_spec("vllm"):
        yield _turboquant(3, key_bytes=50, value_bytes=52)


def _case(tokens: int) -> str:
    what = "one chunk" if tokens == CHUNK else "one token a request"
    return f"{tokens} tokens x {KV_HEADS} heads, D={HEAD_SIZE}, {what}"


def _ours(fmt: Format, kind: str, tokens: int) -> Result:
    device = torch.device("cuda")
    transform = gpu.prepare(
        random_transform(kind, fmt, KV_HEADS, HEAD_SIZE).to(device), fmt, HEAD_SIZE, torch.bfloat16, device
    )
    pages = tokens // PAGE_TOKENS if tokens == CHUNK else tokens
    calls = []
    for _ in range(SETS):
        key, value = (_vectors(tokens) for _ in SIDES)
        cache = torch.zeros(pages, KV_HEADS, PAGE_TOKENS, fmt.token_bytes(HEAD_SIZE), dtype=torch.uint8, device=device)
        page = torch.randperm(pages, device=device)
        if tokens == CHUNK:
            slots = (page[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS, device=device)).flatten()
        else:
            slots = page * PAGE_TOKENS + torch.randint(PAGE_TOKENS, (tokens,), device=device)
        calls.append(partial(gpu.store, key, value, cache, slots, transform))
    moved = tokens * KV_HEADS * (2 * HEAD_SIZE * 2 + fmt.token_bytes(HEAD_SIZE))
    return Result("store", _case(tokens), f"{OURS} {fmt.name} {kind}", milliseconds(calls), moved)


def _vectors(tokens: int) -> Tensor:
    return torch.randn(tokens, KV_HEADS, HEAD_SIZE, device="cuda").bfloat16()


def _turboquant(bits: int, key_bytes: int, value_bytes: int) -> Result:
    """vLLM's store of `turboquant_{bits}bit_nc`, called as its backend calls it."""
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.v1.attention.backends.turboquant_attn import _build_hadamard
    from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

    page_tokens = 16
    centroids = get_centroids(HEAD_SIZE, bits).cuda()
    middle = (centroids[1:] + centroids[:-1]) / 2
    rotation = _build_hadamard(HEAD_SIZE, "cuda").T.contiguous()
    slots = torch.arange(CHUNK, device="cuda", dtype=torch.int32)
    calls = []
    for _ in range(SETS):
        key, value = _vectors(CHUNK), _vectors(CHUNK)
        shape = (CHUNK // page_tokens, page_tokens, KV_HEADS, key_bytes + value_bytes)
        cache = torch.zeros(shape, dtype=torch.uint8, device="cuda")
        quantiser = (rotation, middle, bits, key_bytes, bits)
        calls.append(partial(triton_turboquant_store, key, value, cache, slots, *quantiser, key_fp8=False))
    moved = CHUNK * KV_HEADS * (2 * HEAD_SIZE * 2 + key_bytes + value_bytes)
    return Result("store", _case(CHUNK), f"vLLM turboquant {bits}bit", milliseconds(calls), moved)
