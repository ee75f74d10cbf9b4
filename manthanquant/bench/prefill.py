"""Prefill: chunks over a packed prefix, whole calls, beside FlashAttention over bf16 pages; and its kernel alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from manthanquant.bench.inputs import random_cache, random_transform
from manthanquant.bench.result import OURS, Result
from manthanquant.bench.timing import Call, milliseconds
from manthanquant.cuda.decode import DecodeAttention, decode_transform
from manthanquant.cuda.prefill import (
    WORKSPACE_TOKENS,
    DenseAttention,
    PrefillAttention,
    prefix_transform,
    read_prefix,
)
from manthanquant.formats import K3V3, K42V3, K42V42, Format
from manthanquant.vllm_plugin.flash_attention import flash_attention

HEADS, KV_HEADS, HEAD_SIZE, PAGE_TOKENS = 32, 8, 128, 64
SCALE = HEAD_SIZE**-0.5
CHUNKS = (1024, 2048, 4096, 16384)
PREFIXES = (16384, 65536, 131072)
FEW_QUERIES, FEW_AFTER = (4, 16, 64, 256), 65536  # where decode attention may be the faster one
READ_SETS = 4  # caches and workspaces, taken in turn: together more than the L2 cache holds
ELEMENT_BYTES = 2
REPEATS = 10
CALLS = ((K3V3, "hadamard"), (K42V3, "gain"), (K42V3, "dense"))  # the last is what calibration makes by default
READ = (*CALLS, (K42V42, "hadamard"), (K42V42, "dense"))


def run(peers: bool) -> Iterator[Result]:
    torch.manual_seed(0)
    for fmt, kind in READ:
        yield _read(fmt, kind)
    try:
        dense = flash_attention(torch.device("cuda"))
    except RuntimeError as error:
        print(f"prefill: only the prefix kernel is timed: {error}", file=sys.stderr)
        return
    for prefix in PREFIXES:
        for queries in CHUNKS:
            for fmt, kind in CALLS:
                yield _ours(fmt, kind, queries, prefix, dense)
            if peers:
                yield _flash_attention(queries, prefix)
            torch.cuda.empty_cache()
    for queries in FEW_QUERIES:
        yield _ours(K3V3, "hadamard", queries, FEW_AFTER, dense)
        yield _decode(K3V3, "hadamard", queries, FEW_AFTER)


def _read(fmt: Format, kind: str) -> Result:
    """The prefix kernel: a whole workspace of one request."""
    device, tokens = torch.device("cuda"), WORKSPACE_TOKENS
    attention = _attention(fmt, _no_attention, max_tokens=1)
    (planned,) = attention.plan([1], [tokens]).calls
    transform = prefix_transform(random_transform(kind, fmt, KV_HEADS, HEAD_SIZE), fmt, HEAD_SIZE, device)
    calls = []
    for _ in range(READ_SETS):
        key, value = torch.zeros(2, KV_HEADS, tokens, HEAD_SIZE, dtype=torch.bfloat16, device=device).transpose(1, 2)
        chunk = torch.zeros(1, KV_HEADS, HEAD_SIZE, dtype=torch.bfloat16, device=device)
        cache, table = _pages(fmt, tokens)
        pieces = (planned.pieces, planned.tiles)
        calls.append(partial(read_prefix, key, value, *pieces, cache, table, transform, chunk, chunk))
    moved = tokens * KV_HEADS * (fmt.token_bytes(HEAD_SIZE) + 2 * HEAD_SIZE * ELEMENT_BYTES)
    case = f"{tokens:,} tokens x {KV_HEADS} heads back to bf16, D={HEAD_SIZE}"
    return Result("prefill", case, f"{OURS} {fmt.name} {kind}", milliseconds(calls), moved)


def _ours(fmt: Format, kind: str, queries: int, prefix: int, dense: DenseAttention) -> Result:
    device = torch.device("cuda")
    attention = _attention(fmt, dense, max_tokens=queries)
    transform = prefix_transform(random_transform(kind, fmt, KV_HEADS, HEAD_SIZE), fmt, HEAD_SIZE, device)
    plan = attention.plan([queries], [prefix + queries])
    query, key, value = (_random(queries, heads) for heads in (HEADS, KV_HEADS, KV_HEADS))
    cache, table = _pages(fmt, prefix)
    call = partial(attention, plan, query, key, value, cache, table, transform, SCALE, out=torch.empty_like(query))
    token_bytes = prefix * fmt.token_bytes(HEAD_SIZE) + queries * 2 * HEAD_SIZE * ELEMENT_BYTES
    return _result(f"{OURS} {fmt.name} {kind}, pages of {PAGE_TOKENS}", queries, prefix, token_bytes, call)


def _decode(fmt: Format, kind: str, queries: int, prefix: int) -> Result:
    """The decode kernel on the same queries; it reads the chunk's own tokens from codes, too."""
    device, tokens = torch.device("cuda"), prefix + PAGE_TOKENS * -(-queries // PAGE_TOKENS)
    attention = DecodeAttention(fmt, HEAD_SIZE, HEADS, KV_HEADS, max_requests=1, query_tokens=queries, device=device)
    transform = decode_transform(random_transform(kind, fmt, KV_HEADS, HEAD_SIZE), fmt, HEAD_SIZE, device)
    cache, table = _pages(fmt, tokens)
    lengths = torch.tensor([prefix + queries], dtype=torch.int32, device=device)
    query = _random(queries, HEADS)
    call = partial(attention, query, cache, table, lengths, transform, SCALE, out=torch.empty_like(query))
    token_bytes = (prefix + queries) * fmt.token_bytes(HEAD_SIZE)
    return _result(f"{OURS} {fmt.name} {kind}, decode kernel", queries, prefix, token_bytes, call)


def _flash_attention(queries: int, prefix: int) -> Result:
    """FlashAttention 3 as vLLM calls it: prefix and chunk in bf16 pages."""
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    tokens = prefix + queries
    pages = tokens // PAGE_TOKENS
    key, value = (_random(tokens, KV_HEADS).view(pages, PAGE_TOKENS, KV_HEADS, HEAD_SIZE) for _ in "kv")
    query = _random(queries, HEADS)
    call = partial(
        flash_attn_varlen_func,
        query,
        key,
        value,
        max_seqlen_q=queries,
        cu_seqlens_q=torch.tensor([0, queries], dtype=torch.int32, device="cuda"),
        max_seqlen_k=tokens,
        seqused_k=torch.tensor([tokens], dtype=torch.int32, device="cuda"),
        block_table=torch.randperm(pages, dtype=torch.int32, device="cuda")[None],
        softmax_scale=SCALE,
        causal=True,
        out=torch.empty_like(query),
        fa_version=3,
    )
    subject = f"FlashAttention-3 bf16, pages of {PAGE_TOKENS}"
    return _result(subject, queries, prefix, tokens * 2 * HEAD_SIZE * ELEMENT_BYTES, call)


def _result(subject: str, queries: int, prefix: int, token_bytes: int, call: Call) -> Result:
    taken = milliseconds([call], REPEATS, graph_calls=1)  # milliseconds long: a graph's start is nothing beside it
    moved = KV_HEADS * token_bytes + 2 * queries * HEADS * HEAD_SIZE * ELEMENT_BYTES
    pairs = queries * prefix + queries * (queries + 1) // 2
    case = f"{queries:,} queries after {prefix:,} tokens, {HEADS} / {KV_HEADS} heads, D={HEAD_SIZE}"
    return Result("prefill", case, subject, taken, moved, operations=4 * pairs * HEADS * HEAD_SIZE)


def _attention(fmt: Format, dense: DenseAttention, max_tokens: int) -> PrefillAttention:
    return PrefillAttention(
        fmt,
        HEAD_SIZE,
        HEADS,
        KV_HEADS,
        dense=dense,
        dtype=torch.bfloat16,
        max_tokens=max_tokens,
        device=torch.device("cuda"),
    )


def _no_attention(*_: object, **__: object) -> Tensor:
    raise NotImplementedError("only what it would read is timed")


def _pages(fmt: Format, tokens: int) -> tuple[Tensor, Tensor]:
    """A cache of random codes, and one request's block table over its pages in random order."""
    pages = tokens // PAGE_TOKENS
    table = torch.randperm(pages, dtype=torch.int32, device="cuda")[None]
    return random_cache(fmt, (pages, KV_HEADS, PAGE_TOKENS), HEAD_SIZE), table


def _random(tokens: int, heads: int) -> Tensor:
    return torch.randn(tokens, heads, HEAD_SIZE, device="cuda").bfloat16()
