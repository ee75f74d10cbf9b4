"""Prefill on the GPU: attention of chunks of new tokens to a packed prefix and to themselves, exact.

The prefix is dequantised, as the model made it, into a workspace of fixed size, whatever the context's length: a kernel
near the memory's speed. A dense attention kernel of somebody else's, FlashAttention, then reads it. Chunks of a
thousand queries are bound by the matrix units, so a pass over memory before them costs a few percent; a fused kernel
would have to be as good as FlashAttention at everything else.

`PrefillAttention` serves all layers of one shape. What to read and to call is planned once a step, on the CPU, from the
lengths that an engine has there; a call then waits for nothing. Meaning: `ops.attention` with `chunk`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from manthanquant.cuda.fragments import core_matrices
from manthanquant.cuda.module import address, module_for, stream_of, traceable
from manthanquant.cuda.prefill_plan import Call, plan_calls
from manthanquant.formats import UNIT_TOKENS, Format, Side, get_paged
from manthanquant.jit.kernels import prefix_extension
from manthanquant.packing import pages_as_units
from manthanquant.reference import HotPool
from manthanquant.transform import LayerTransform, SideTransform

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
WORKSPACE_TOKENS = 32768
LARGEST_ELEMENT = 2.0**14  # of a matrix in fp16
PIECE_NUMBERS = 8  # csrc/prefix.h, PrefixPiece
_NEGATIVE_ZERO = 0x80008000  # csrc/ptx.cuh, high_half


class DenseAttention(Protocol):
    """Attention of ragged requests over plain keys and values, as FlashAttention's `flash_attn_varlen_func`."""

    def __call__(
        self,
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
        """Writes `out` and returns the logarithms of the softmax's sums.

        Args:
            query, out: `[queries, heads, D]`.
            key, value: `[keys, KV heads, D]`, the last dimension contiguous.
            query_starts, key_starts: int32 `[requests + 1]` on the GPU, where each request's rows begin.
            max_queries, max_keys: the most of one request.
            scale: factor of the scores.
            causal: a request's last query sees its last key, the one before it one less, and so on.
            left: keys that a query sees before that one (not causal: it is counted alike); None for all.
            soft_cap: c of `c tanh(score / c)`; None for none.

        Returns:
            fp32 `[heads, queries]`; infinite, of either sign, for a query that saw no key.
        """
        ...


@dataclass(frozen=True)
class PrefixOperand:
    """One side's inverse transform as the kernel takes it: `(levels M^T) * factor`.

    Attributes:
        matrix: M, fp16 `[KV heads or 1, D / 8, D / 8, 8, 8]`: T^-1 over the factor, as `core_matrices`.
        factor: fp32 `[KV heads or 1]`.
    """

    matrix: Tensor
    factor: Tensor


@dataclass(frozen=True)
class PrefixTransform:
    """A layer's inverse transforms on the GPU, and the key mean, fp32 `[KV heads, D]`. `prefix_transform` makes it."""

    fmt: Format
    head_size: int
    key: PrefixOperand
    value: PrefixOperand
    key_mean: Tensor | None


def prefix_transform(transform: LayerTransform, fmt: Format, head_size: int, device: torch.device) -> PrefixTransform:
    """A layer's transform in the form the kernel uses. Raises `ValueError` for a value mean."""
    if transform.value.mean is not None:
        raise ValueError("a value mean is not supported by the GPU prefill: take it off keys only")
    mean = transform.key.mean
    return PrefixTransform(
        fmt,
        head_size,
        _operand(transform.key, "key", device),
        _operand(transform.value, "value", device),
        None if mean is None else mean.to(device, torch.float32).contiguous(),
    )


def _operand(side: SideTransform, name: Side, device: torch.device) -> PrefixOperand:
    # Scaled so that no element overflows and those 2^28 times smaller still have fp16's 11 bits. A Hadamard rotation is
    # exact where all its blocks are of one order, as all its elements are equally large then.
    inverse = side.inverse.double().cpu()
    factor = inverse.abs().amax((1, 2)) / LARGEST_ELEMENT
    matrix = core_matrices(inverse / factor[:, None, None], torch.float16, grouped_in=name == "key")
    return PrefixOperand(matrix.to(device), factor.float().to(device))


@dataclass(frozen=True)
class PlannedCall:
    """A call with its tables on the GPU.

    Attributes:
        call: what it is.
        pieces: int32 `[pieces, 8]`; see csrc/prefix.h.
        tiles: of its pieces.
        query_starts, key_starts: int32 `[requests + 1]`.
    """

    call: Call
    pieces: Tensor
    tiles: int
    query_starts: Tensor
    key_starts: Tensor


@dataclass(frozen=True)
class PrefillPlan:
    """What to do for a batch: the same for all layers with one window."""

    tokens: int
    requests: int
    calls: tuple[PlannedCall, ...]


def read_prefix(
    key_out: Tensor,
    value_out: Tensor,
    pieces: Tensor,
    tiles: int,
    cache: Tensor,
    block_table: Tensor,
    transform: PrefixTransform,
    chunk_key: Tensor,
    chunk_value: Tensor,
    hot: HotPool | None = None,
    sink_tokens: int = 0,
    recent_tokens: int = 0,
) -> None:
    """Writes pieces of prefixes, as the model made them, and the chunk's tokens behind them; one launch.

    Args:
        key_out, value_out: bf16 or fp16 `[rows, KV heads, D]` with equal strides; rows start at multiples of 16 bytes.
        pieces, tiles: of a `PlannedCall`. They are trusted: a wrong one writes out of bounds.
        cache: uint8 `[pages, KV heads, page tokens, token bytes]`.
        block_table: int32 `[requests, pages]`.
        chunk_key, chunk_value: `[tokens, KV heads, D]` of the outputs' dtype.
        hot, sink_tokens, recent_tokens: the exact tier, read as `chunk.read_prefix` reads it.

    Raises:
        ValueError: an argument does not fit the others; the text names it.
    """
    key, value = transform.key, transform.value
    _read_prefix(
        key_out,
        value_out,
        pieces,
        tiles,
        cache,
        block_table,
        transform.fmt.name,
        [key.matrix, value.matrix],
        [key.factor, value.factor],
        transform.key_mean,
        chunk_key,
        chunk_value,
        hot.key if hot else None,
        hot.value if hot else None,
        hot.slot if hot else None,
        sink_tokens,
        recent_tokens,
    )


def _launch_read_prefix(
    key_out: Tensor,
    value_out: Tensor,
    pieces: Tensor,
    tiles: int,
    cache: Tensor,
    block_table: Tensor,
    fmt_name: str,
    matrices: list[Tensor],
    factors: list[Tensor],
    key_mean: Tensor | None,
    chunk_key: Tensor,
    chunk_value: Tensor,
    hot_key: Tensor | None,
    hot_value: Tensor | None,
    hot_slot: Tensor | None,
    sink_tokens: int,
    recent_tokens: int,
) -> None:
    fmt, (_, kv_heads, head_size) = get_paged(fmt_name), key_out.shape
    units = pages_as_units(cache, fmt, head_size)
    if key_out.dtype not in DTYPES:
        raise ValueError(f"key_out: dtype {key_out.dtype} is not supported: use one of {', '.join(map(str, DTYPES))}")
    for name, x in (("value_out", value_out), ("chunk_key", chunk_key), ("chunk_value", chunk_value)):
        if x.dtype != key_out.dtype or x.shape[1:] != key_out.shape[1:]:
            raise ValueError(
                f"{name}: {x.dtype} {tuple(x.shape)}: need {key_out.dtype} [rows, {kv_heads}, {head_size}], as key_out"
            )
    if value_out.stride() != key_out.stride() or not (_aligned(key_out) and _aligned(value_out)):
        raise ValueError(
            f"key_out, value_out: strides {key_out.stride()}, {value_out.stride()}: need equal multiples of 8"
        )
    if cache.shape[1] != kv_heads or cache.data_ptr() % 16 or units.stride(0) % 16 or units.stride(1) % 16:
        raise ValueError(
            f"cache: {tuple(cache.shape)}, strides {cache.stride()}: need {kv_heads} heads, and units that start at "
            "multiples of 16 bytes"
        )
    if block_table.dtype != torch.int32 or block_table.stride(1) != 1:
        raise ValueError(
            f"block_table: {block_table.dtype}, strides {block_table.stride()}: need int32, rows contiguous"
        )
    for name, pool in (("hot.key", hot_key), ("hot.value", hot_value)):
        if pool is not None and (pool.dtype != torch.bfloat16 or not pool.is_contiguous()):
            raise ValueError(f"{name}: {pool.dtype}, strides {pool.stride()}: need contiguous bfloat16")
    chunks = [x if _aligned(x) else x.clone(memory_format=torch.contiguous_format) for x in (chunk_key, chunk_value)]
    sides = [
        (
            out.data_ptr(),
            matrix.data_ptr(),
            0 if matrix.shape[0] == 1 else matrix.stride(0) * matrix.element_size(),
            factor.data_ptr(),
            0 if factor.shape[0] == 1 else factor.stride(0),
            chunk.data_ptr(),
            chunk.stride(0),
            chunk.stride(1),
            address(pool),
        )
        for out, matrix, factor, chunk, pool in zip(
            (key_out, value_out), matrices, factors, chunks, (hot_key, hot_value)
        )
    ]
    with torch.cuda.device(cache.device):
        module = module_for(prefix_extension(fmt, head_size, DTYPES[key_out.dtype]), cache.device)
        module.read_prefix(
            stream_of(cache.device),
            *sides,
            address(key_mean),
            key_out.stride(0),
            key_out.stride(1),
            pieces.data_ptr(),
            pieces.shape[0],
            tiles,
            block_table.data_ptr(),
            block_table.stride(0),
            cache.data_ptr(),
            units.stride(0),
            units.stride(1),
            units.shape[2],
            kv_heads,
            address(hot_slot),
            -(-sink_tokens // UNIT_TOKENS),
            max(recent_tokens, 0),
            _NEGATIVE_ZERO,
        )


def _launch_merge(out: Tensor, lse: Tensor, partial: Tensor, partial_lse: Tensor, fmt_name: str) -> None:
    """Folds attention over more keys into `out` `[T, heads, D]`, and its sums into `lse` `[heads, T or more]`."""
    tokens, heads, head_size = out.shape
    with torch.cuda.device(out.device):
        module = module_for(prefix_extension(get_paged(fmt_name), head_size, DTYPES[out.dtype]), out.device)
        module.merge(
            stream_of(out.device),
            out.data_ptr(),
            out.stride(0),
            out.stride(1),
            lse.data_ptr(),
            lse.stride(0),
            partial.data_ptr(),
            partial_lse.data_ptr(),
            tokens,
            heads,
        )


_read_prefix = traceable("read_prefix", _launch_read_prefix, writes=("key_out", "value_out"))
_merge = traceable("merge_attention", _launch_merge, writes=("out", "lse"))


def _aligned(x: Tensor) -> bool:
    """Whether rows can be read sixteen bytes at a time."""
    return x.stride(2) == 1 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0


class PrefillAttention:
    """Prefill attention for layers of one shape.

    Args:
        fmt, head_size, heads, kv_heads, dtype: of the layers; `dtype` of queries, keys, values and output.
        dense: the dense attention, e.g. `vllm_plugin.flash_attention`.
        max_tokens: most tokens of a batch.
        workspace_tokens: tokens of prefix and chunk that one dense call reads, a multiple of 16. Each takes
            `2 * kv_heads * head_size` elements. Longer contexts are read in blocks of this size.
        device: a CUDA device.

    All memory is taken here: the workspace, and an output of `max_tokens` for all but the first block. The kernel is
    compiled, or found in the cache, at the first call. Calls on different streams need different instances.
    """

    def __init__(
        self,
        fmt: Format,
        head_size: int,
        heads: int,
        kv_heads: int,
        *,
        dense: DenseAttention,
        dtype: torch.dtype,
        max_tokens: int,
        workspace_tokens: int = WORKSPACE_TOKENS,
        device: torch.device,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype} is not supported by the GPU prefill: use {', '.join(map(str, DTYPES))}")
        if heads % kv_heads:
            raise ValueError(f"heads: {heads} is not a multiple of {kv_heads} KV heads")
        self.fmt, self.head_size, self.heads, self.kv_heads, self.dtype = fmt, head_size, heads, kv_heads, dtype
        self.workspace_tokens, self.device, self._dense = workspace_tokens, device, dense
        # Zeros, not whatever was there: dense kernels read whole tiles, past a request's end, and hide what they read
        # there by a factor of zero. Heads outermost: a warp writes, and a dense kernel reads, runs of rows.
        workspace = torch.zeros(2, kv_heads, workspace_tokens, head_size, dtype=dtype, device=device)
        self._key, self._value = workspace.transpose(1, 2)
        self._partial = torch.empty(max_tokens, heads, head_size, dtype=dtype, device=device)

    def plan(self, query_lens: Sequence[int], seq_lens: Sequence[int], window: int | None = None) -> PrefillPlan:
        """Plans a batch from its lengths; see `prefill_plan.plan_calls`. Queues one copy to the GPU."""
        calls = plan_calls(query_lens, seq_lens, window, self.workspace_tokens)
        numbers: list[int] = []
        for call in calls:  # all pieces first: they are read 16 bytes at a time
            tiles = accumulate((piece.tiles for piece in call.pieces), initial=0)
            for p, tile in zip(call.pieces, tiles):
                numbers += [p.request, p.first, p.last, p.length, p.row, p.chunk_first, p.chunk_tokens, tile]
        piece_numbers = len(numbers)
        for call in calls:
            numbers += accumulate(call.query_lens, initial=0)
            numbers += accumulate(call.key_lens, initial=0)
        pinned = torch.tensor(numbers, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        table = pinned.to(self.device, non_blocking=True)
        pieces, starts = table[:piece_numbers].view(-1, PIECE_NUMBERS), table[piece_numbers:]
        planned = []
        for call in calls:
            count, ends = len(call.pieces), len(call.query_lens) + 1
            tiles_of_call = sum(piece.tiles for piece in call.pieces)
            planned.append(PlannedCall(call, pieces[:count], tiles_of_call, starts[:ends], starts[ends : 2 * ends]))
            pieces, starts = pieces[count:], starts[2 * ends :]
        return PrefillPlan(sum(query_lens), len(query_lens), tuple(planned))

    def __call__(
        self,
        plan: PrefillPlan,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: Tensor,
        block_table: Tensor,
        transform: PrefixTransform,
        scale: float,
        *,
        soft_cap: float | None = None,
        hot: HotPool | None = None,
        sink_tokens: int = 0,
        recent_tokens: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attention of the batch's tokens to the cached tokens before them and to themselves.

        Args:
            plan: of this batch.
            query: `[T, heads, D]`.
            key, value: `[T, KV heads, D]`, the chunk's own.
            cache, block_table: see `read_prefix`.
            transform: of the layer.
            scale, soft_cap: see `DenseAttention`.
            hot, sink_tokens, recent_tokens: the exact tier; the counts are of the tokens before the chunk.
            out: `[T, heads, D]`, heads of a token contiguous; made if not given.

        Raises:
            ValueError: an argument does not fit the others; the text names it.
        """
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
        self._check(plan, query, key, value, block_table, out)
        lse = torch.empty(0)
        for planned in plan.calls:
            call = planned.call
            queries = call.queries
            keys, values = key[queries], value[queries]
            if call.pieces:
                read_prefix(
                    self._key,
                    self._value,
                    planned.pieces,
                    planned.tiles,
                    cache,
                    block_table,
                    transform,
                    key,
                    value,
                    hot,
                    sink_tokens,
                    recent_tokens,
                )
                keys, values = (side[: sum(call.key_lens)] for side in (self._key, self._value))
            target = self._partial[: sum(call.query_lens)] if call.merges else out[queries]
            found = self._dense(
                query[queries],
                keys,
                values,
                query_starts=planned.query_starts,
                key_starts=planned.key_starts,
                max_queries=max(call.query_lens),
                max_keys=max(call.key_lens),
                scale=scale,
                causal=call.causal,
                left=call.left,
                soft_cap=soft_cap,
                out=target,
            )
            if call.merges:
                _merge(out[queries], lse, target, found, self.fmt.name)
            else:
                lse = found
        return out

    def _check(
        self, plan: PrefillPlan, query: Tensor, key: Tensor, value: Tensor, block_table: Tensor, out: Tensor
    ) -> None:
        if plan.tokens > self._partial.shape[0]:
            raise ValueError(f"plan: {plan.tokens} tokens, but this instance was made for {self._partial.shape[0]}")
        if block_table.shape[0] < plan.requests:
            raise ValueError(f"block_table: {block_table.shape[0]} rows for {plan.requests} requests")
        shapes = (("query", query, self.heads), ("out", out, self.heads))
        for name, x, heads in (*shapes, ("key", key, self.kv_heads), ("value", value, self.kv_heads)):
            if x.dtype != self.dtype or x.shape[0] < plan.tokens or x.shape[1:] != (heads, self.head_size):
                raise ValueError(
                    f"{name}: {x.dtype} {tuple(x.shape)}: need {self.dtype} "
                    f"[at least {plan.tokens}, {heads}, {self.head_size}]"
                )
        if not _aligned(out):
            raise ValueError(
                f"out: strides {out.stride()} and address must be multiples of 16 bytes, channels contiguous"
            )
