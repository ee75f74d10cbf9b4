"""Decode attention on the GPU: softmax(q K^T) V over packed pages, for one or a few new tokens a request.

`DecodeAttention` serves all layers of one shape. A call launches one kernel (three with dense transforms), allocates
nothing when it is given `out`, and never waits for the GPU, so it can be captured in a CUDA graph; a captured call is
right and balanced for any sequence lengths and block table it is replayed with, up to the shapes it was captured for.

Accuracy: queries are 15-bit and probabilities 16-bit integers; against attention in fp64 over the dequantised cache
the output's relative L2 error is below `ERROR_BOUND` (before it is rounded to the output's dtype).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from manthanquant.cuda.module import module_for, stream_of
from manthanquant.formats import UNIT_TOKENS, Format, Side, check_page_tokens
from manthanquant.jit.kernels import DECODE_ROWS, decode_extension
from manthanquant.reference import HotPool
from manthanquant.transform import LayerTransform, SideTransform, hadamard_block, signs

ERROR_BOUND = 5e-4
LOG2_E = math.log2(math.e)
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # csrc/decode_params.h, Dtype
_NEGATIVE_ZERO = 0x80008000  # csrc/ptx.cuh, high_half
_SMALL_TEAMS_FROM = 3.5  # pairs a multiprocessor, from where small teams are faster


@dataclass(frozen=True)
class SideTables:
    """One side's inverse transform as the kernels take it.

    Attributes:
        factor: fp32 `[KV heads or 1, D]`, structured transforms; None for a dense one.
        order: int32, same shape; None for the identity.
        matrix: fp32 `[KV heads or 1, D, D]`, dense transforms: rows times matrix. None for a structured one.
    """

    factor: Tensor | None = None
    order: Tensor | None = None
    matrix: Tensor | None = None

    def structured(self) -> tuple[int, int, int]:
        """Factor, order and elements between KV heads, as the binding takes them."""
        if self.factor is None:
            return 0, 0, 0
        stride = 0 if self.factor.shape[0] == 1 else self.factor.shape[1]
        return self.factor.data_ptr(), 0 if self.order is None else self.order.data_ptr(), stride


@dataclass(frozen=True)
class DecodeTransform:
    """A layer's transforms on the GPU. Make it once, with `decode_transform`."""

    key: SideTables
    value: SideTables
    key_mean: Tensor | None = None


def _side_tables(transform: SideTransform, fmt: Format, side: Side, head_size: int, device: torch.device) -> SideTables:
    if transform.kind in ("none", "dense"):
        # Queries: q T^-1. Outputs: rows times the transpose of T^-1.
        matrix = transform.inverse if side == "key" else transform.inverse.transpose(1, 2)
        return SideTables(matrix=matrix.to(device, torch.float32).contiguous())
    # H diag(s) diag(gain) P, inverted or inverse-transposed: the same butterflies with s / gain, H's norm included.
    norm = [hadamard_block(n) ** -0.5 for n in fmt.segments(side, head_size) for _ in range(n)]
    factor = (torch.tensor(norm) * torch.tensor(signs(head_size, side)))[None]
    if transform.gain is None or transform.order is None:
        return SideTables(factor=factor.to(device))
    return SideTables(
        factor=(factor / transform.gain.cpu()).to(device).contiguous(),
        order=transform.order.to(device, torch.int32).contiguous(),
    )


def decode_transform(transform: LayerTransform, fmt: Format, head_size: int, device: torch.device) -> DecodeTransform:
    """A layer's transform in the form the kernels use, on `device`."""
    mean = transform.key.mean
    return DecodeTransform(
        _side_tables(transform.key, fmt, "key", head_size, device),
        _side_tables(transform.value, fmt, "value", head_size, device),
        None if mean is None else mean.to(device, torch.float32).contiguous(),
    )


def rows_at_a_time(group: int, query_tokens: int) -> int:
    """Which build serves `group` query heads a KV head and `query_tokens` new tokens a request."""
    return DECODE_ROWS[0] if group * query_tokens <= DECODE_ROWS[0] else DECODE_ROWS[1]


class DecodeAttention:
    """Decode attention for layers of one shape.

    Args:
        fmt, head_size, heads, kv_heads: of the layers.
        max_requests: a launch's most requests.
        query_tokens: new tokens of each request, all attended causally.
        exact: whether calls may bring the exact tier; the kernel without it is a little faster.
        bulk_copy: see `decode_extension`.
        device: a CUDA device.

    The kernel is compiled, or found in the cache, here. Instances share nothing, so calls on different streams need
    different instances.
    """

    def __init__(
        self,
        fmt: Format,
        head_size: int,
        heads: int,
        kv_heads: int,
        *,
        max_requests: int,
        query_tokens: int = 1,
        exact: bool = False,
        bulk_copy: bool | None = None,
        device: torch.device,
    ) -> None:
        if heads % kv_heads:
            raise ValueError(f"heads: {heads} query heads are no multiple of {kv_heads} KV heads")
        rows = rows_at_a_time(heads // kv_heads, query_tokens)
        build = module_for(decode_extension(fmt, head_size, rows, exact=exact, bulk_copy=bulk_copy), device)
        self.build, self.fmt, self.head_size = build, fmt, head_size
        self.heads, self.kv_heads, self.query_tokens = heads, kv_heads, query_tokens
        self.max_requests = max_requests
        self.ctas = torch.cuda.get_device_properties(device).multi_processor_count
        self.row_tiles = -(-heads // kv_heads * query_tokens // build.ROWS)
        pairs = max_requests * kv_heads * self.row_tiles
        most_teams = self.ctas * build.WARPS // build.SMALL_TEAM
        slots = (pairs + most_teams) * (2 if build.MAX_EXACT_UNITS else 1)
        self._tiles = torch.empty(slots, build.TILE_FLOATS, device=device)
        self._states = torch.empty(slots, build.ROWS, 2, device=device)
        self._arrivals = torch.zeros(pairs, dtype=torch.int32, device=device)
        shape = (max_requests * query_tokens, heads, head_size)
        self._query_rows = torch.empty(shape, device=device)  # dense transforms only; small
        self._coded_rows = torch.empty(shape, device=device)
        self._exact_rows = torch.empty(shape, device=device) if build.MAX_EXACT_UNITS else None

    def __call__(
        self,
        query: Tensor,
        cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        transform: DecodeTransform,
        scale: float,
        *,
        window: int | None = None,
        soft_cap: float | None = None,
        sink_logits: Tensor | None = None,
        hot: HotPool | None = None,
        sink_tokens: int = 0,
        recent_tokens: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attention of each request's newest tokens over its cached tokens, themselves included.

        Args:
            query: bf16, fp16 or fp32 `[requests * query_tokens, heads, D]`, channels contiguous.
            cache: uint8 `[pages, KV heads, page tokens, token bytes]`, see `formats`.
            block_table: int32 `[requests, pages]`, a row contiguous.
            seq_lens: int32 `[requests]`, new tokens included; 0 gives zeros (a padded request).
            transform: of the layer.
            scale: of the softmax.
            window: tokens a query sees, itself included; None for all.
            soft_cap: scores become `c tanh(score / c)`.
            sink_logits: fp32 `[heads]`: a logit that takes part in each row's softmax and has no value.
            hot, sink_tokens, recent_tokens: the exact tier, as `reference.attention` takes it; needs a build with it.
            out: as `query`; may have another dtype.

        Lengths and table must be complete before the kernel that precedes this one on the stream starts: they are
        read while that kernel ends. Raises `ValueError` for shapes, dtypes and strides that do not fit.
        """
        requests = seq_lens.shape[0]
        out = torch.empty_like(query) if out is None else out
        self._check(query, cache, block_table, seq_lens, out, hot, sink_tokens, recent_tokens)
        if requests == 0:
            return out
        params = self.build.DecodeParams()
        stream = stream_of(query.device)

        params.cache, params.page_stride, params.head_stride = cache.data_ptr(), cache.stride(0), cache.stride(1)
        params.page_units = page_units = cache.shape[2] // UNIT_TOKENS
        params.page_magic = -(-(1 << 31) // page_units)
        params.block_table, params.table_stride = block_table.data_ptr(), block_table.stride(0)
        params.seq_lens = seq_lens.data_ptr()
        params.query, params.query_dtype = query.data_ptr(), _DTYPES[query.dtype]
        params.query_token_stride, params.query_head_stride = query.stride(0), query.stride(1)
        params.out, params.out_dtype = out.data_ptr(), _DTYPES[out.dtype]
        params.out_token_stride, params.out_head_stride = out.stride(0), out.stride(1)
        params.requests, params.kv_heads, params.group = requests, self.kv_heads, self.heads // self.kv_heads
        params.query_tokens, params.row_tiles = self.query_tokens, self.row_tiles
        params.scale_log2 = scale * LOG2_E
        params.soft_cap_log2 = (soft_cap or 0.0) * LOG2_E
        params.window = window or 0
        params.sink_logits = 0 if sink_logits is None else sink_logits.data_ptr()
        params.key_inverse, params.value_inverse = transform.key.structured(), transform.value.structured()
        params.key_mean = 0 if transform.key_mean is None else transform.key_mean.data_ptr()
        if hot is not None:
            params.hot_key, params.hot_value, params.hot_slot = (t.data_ptr() for t in hot)
            params.hot_slot_stride, params.hot_head_stride = hot.key.stride(0), hot.key.stride(1)
            params.sink_units, params.recent_tokens = -(-sink_tokens // UNIT_TOKENS), max(recent_tokens, 0)
        params.partial_tiles, params.partial_states = self._tiles.data_ptr(), self._states.data_ptr()
        params.arrivals = self._arrivals.data_ptr()
        params.negative_zero = _NEGATIVE_ZERO

        if transform.key.matrix is not None:
            self._dense(query, transform.key.matrix, self._query_rows[: query.shape[0]], None, stream)
            params.transformed_query = self._query_rows.data_ptr()
        if transform.value.matrix is not None:
            params.coded_out = self._coded_rows.data_ptr()
            params.exact_out = 0 if self._exact_rows is None else self._exact_rows.data_ptr()
        pairs = requests * self.kv_heads * self.row_tiles
        self.build.decode(params, self.ctas, pairs >= _SMALL_TEAMS_FROM * self.ctas, stream)
        if transform.value.matrix is not None:
            self._dense(self._coded_rows[: query.shape[0]], transform.value.matrix, out, self._exact_rows, stream)
        return out

    def _dense(self, rows: Tensor, matrix: Tensor, out: Tensor, addend: Tensor | None, stream: int) -> None:
        params = self.build.DenseParams()
        params.in_, params.in_dtype = rows.data_ptr(), _DTYPES[rows.dtype]
        params.in_token_stride, params.in_head_stride = rows.stride(0), rows.stride(1)
        params.matrix = matrix.data_ptr()
        params.matrix_head_stride = 0 if matrix.shape[0] == 1 else matrix.stride(0)
        params.addend = 0 if addend is None else addend.data_ptr()
        params.out, params.out_dtype = out.data_ptr(), _DTYPES[out.dtype]
        params.out_token_stride, params.out_head_stride = out.stride(0), out.stride(1)
        params.tokens, params.kv_heads, params.group = rows.shape[0], self.kv_heads, self.heads // self.kv_heads
        self.build.dense(params, stream)

    def _check(
        self,
        query: Tensor,
        cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        out: Tensor,
        hot: HotPool | None,
        sink_tokens: int,
        recent_tokens: int,
    ) -> None:
        requests, rows = seq_lens.shape[0], (self.heads, self.head_size)
        if requests > self.max_requests:
            raise ValueError(f"seq_lens: {requests} requests, but this instance was made for {self.max_requests}")
        for name, tensor in (("query", query), ("out", out)):
            if tensor.dtype not in _DTYPES:
                raise ValueError(f"{name}: dtype {tensor.dtype} is not supported: use one of {tuple(_DTYPES)}")
            if tensor.shape != (requests * self.query_tokens, *rows) or tensor.stride(2) != 1:
                raise ValueError(
                    f"{name}: shape {tuple(tensor.shape)}, strides {tensor.stride()}: need "
                    f"{(requests * self.query_tokens, *rows)} with contiguous channels"
                )
        check_page_tokens(cache.shape[2])
        token_bytes = self.fmt.token_bytes(self.head_size)
        run = (self.kv_heads, cache.shape[2], token_bytes)
        if cache.dtype != torch.uint8 or cache.shape[1:] != run or cache.stride()[2:] != (token_bytes, 1):
            raise ValueError(
                f"cache: {cache.dtype} {tuple(cache.shape)}, strides {cache.stride()}: need uint8 [pages, {run[0]}, "
                f"page tokens, {token_bytes}] with the tokens of a page and head contiguous"
            )
        if cache.stride(0) % 16 or cache.stride(1) % 16 or cache.data_ptr() % 16:
            raise ValueError(f"cache: strides {cache.stride()} and address must be multiples of 16 bytes")
        for name, table in (("block_table", block_table), ("seq_lens", seq_lens)):
            if table.dtype != torch.int32 or table.stride(-1) != 1:
                raise ValueError(f"{name}: need int32, the last dimension contiguous; got {table.dtype}")
        if block_table.shape[0] != requests:
            raise ValueError(f"block_table: {block_table.shape[0]} rows for {requests} requests")
        if hot is None:
            return
        units = -(-sink_tokens // UNIT_TOKENS) + -(-max(recent_tokens, 0) // UNIT_TOKENS) + 1
        if units > self.build.MAX_EXACT_UNITS:
            raise ValueError(
                f"recent_tokens, sink_tokens: {recent_tokens} and {sink_tokens} are {units} units, but this build "
                f"keeps {self.build.MAX_EXACT_UNITS}: ask for fewer, or for a build with the exact tier"
            )
        for name, pool in (("hot.key", hot.key), ("hot.value", hot.value)):
            if pool.dtype != torch.bfloat16 or pool.shape[1:] != (self.kv_heads, UNIT_TOKENS, self.head_size):
                raise ValueError(f"{name}: {pool.dtype} {tuple(pool.shape)}: need bfloat16 [slots, KV heads, 16, D]")
            if pool.stride() != hot.key.stride() or pool.stride()[2:] != (self.head_size, 1):
                raise ValueError(f"{name}: strides {pool.stride()}: both pools alike, units contiguous")
