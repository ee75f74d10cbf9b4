"""Decode attention on the GPU: softmax(q K^T) V over packed pages, for one or a few new tokens a request.

`DecodeAttention` serves all layers of one shape. A call launches one kernel, allocates nothing when it is given `out`,
and never waits for the GPU, so it can be captured in a CUDA graph; a captured call is right and balanced for any
sequence lengths and block table it is replayed with, up to the shapes it was captured for.

Accuracy: queries are 15-bit and probabilities 16-bit integers; a dense matrix and what it multiplies are sums of two
bf16. Against attention in fp64 over the dequantised cache the output's relative L2 error is below `ERROR_BOUND` (before
it is rounded to the output's dtype).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from manthanquant.cuda.fragments import b_fragments
from manthanquant.cuda.module import address, module_for, multiprocessors, stream_of, traceable
from manthanquant.formats import UNIT_TOKENS, Format, Side, check_page_tokens, get_paged
from manthanquant.jit.kernels import DECODE_ROWS, decode_extension
from manthanquant.reference import HotPool
from manthanquant.transform import LayerTransform, SideTransform, rotation_factor

ERROR_BOUND = 5e-4
LOG2_E = math.log2(math.e)
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # csrc/decode_params.h, Dtype
_NEGATIVE_ZERO = 0x80008000  # csrc/ptx.cuh, high_half
_SMALL_TEAMS_FROM = 3.5  # pairs a multiprocessor, from where medium teams are faster; small ones from twice as many


@dataclass(frozen=True)
class SideTables:
    """One side's inverse transform as the kernels take it.

    Attributes:
        factor: fp32 `[KV heads or 1, D]`, structured transforms; None for a dense one.
        order: int32, same shape; None for the identity.
        matrix: dense transforms, as `dense_fragments` gives it. None for a structured one.
    """

    factor: Tensor | None = None
    order: Tensor | None = None
    matrix: Tensor | None = None


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
        return SideTables(matrix=dense_fragments(matrix).to(device))
    # H diag(s) diag(gain) P, inverted or inverse-transposed: the same butterflies with s / gain, H's norm included.
    factor = rotation_factor(fmt, side, head_size)[None]
    if transform.gain is None or transform.order is None:
        return SideTables(factor=factor.to(device))
    return SideTables(
        factor=(factor / transform.gain.cpu()).to(device).contiguous(),
        order=transform.order.to(device, torch.int32).contiguous(),
    )


def dense_fragments(matrix: Tensor) -> Tensor:
    """What rows are multiplied by, `[H, D, D]`, dealt to lanes as `DenseProduct` (csrc/decode_dense.cuh) reads it.

    bf16 `[H, D / 16 out, D / 16 in, (high, low), lane, (register, element)]`. As an A operand a block has its channels
    in for columns: its registers are those of `b_fragments`, the two tiles of channels out in turns.
    """
    dealt = b_fragments(matrix.transpose(1, 2).float().cpu(), torch.float32)
    dealt = dealt.unflatten(-1, (2, 2, 2)).transpose(-3, -2).flatten(-3).transpose(1, 2)
    high = dealt.bfloat16()
    return torch.stack([high, (dealt - high.float()).bfloat16()], dim=3).contiguous()


def decode_transform(transform: LayerTransform, fmt: Format, head_size: int, device: torch.device) -> DecodeTransform:
    """A layer's transform in the form the kernels use, on `device`."""
    mean = transform.key.mean
    return DecodeTransform(
        _side_tables(transform.key, fmt, "key", head_size, device),
        _side_tables(transform.value, fmt, "value", head_size, device),
        None if mean is None else mean.to(device, torch.float32).contiguous(),
    )


def rows_at_a_time(group: int, query_tokens: int) -> int:
    """Which build serves `group` query heads a KV head and up to `query_tokens` new tokens a request."""
    rows = group * query_tokens
    return next((built for built in DECODE_ROWS if built >= rows), DECODE_ROWS[-1])


@cache
def _build(
    fmt_name: str, head_size: int, rows: int, exact: bool, bulk_copy: bool | None, device: torch.device
) -> ModuleType:
    extension = decode_extension(get_paged(fmt_name), head_size, rows, exact=exact, bulk_copy=bulk_copy)
    return module_for(extension, device)


class DecodeAttention:
    """Decode attention for layers of one shape.

    Args:
        fmt, head_size, heads, kv_heads: of the layers.
        max_requests: a launch's most requests.
        query_tokens: most new tokens of a request, all attended causally.
        exact: whether calls may bring the exact tier; the kernel without it is a little faster.
        bulk_copy: see `decode_extension`.
        device: a CUDA device.

    The kernel is compiled, or found in the cache, here. Instances share nothing, so calls on different streams need
    different instances. Under `torch.compile` a call is one operator.
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
        self.rows = rows_at_a_time(heads // kv_heads, query_tokens)
        build = _build(fmt.name, head_size, self.rows, exact, bulk_copy, device)
        self.fmt, self.head_size, self.exact, self.bulk_copy = fmt, head_size, exact, bulk_copy
        self.heads, self.kv_heads, self.query_tokens = heads, kv_heads, query_tokens
        self.max_requests = max_requests
        row_tiles = -(-heads // kv_heads * query_tokens // build.ROWS)
        pairs = max_requests * kv_heads * row_tiles
        most_teams = multiprocessors(device) * build.WARPS // build.SMALL_TEAM
        slots = (pairs + most_teams) * (2 if exact else 1)
        # Parts of a pair: tiles of output, weights of rows, how many have arrived.
        self._scratch = [
            torch.empty(slots, build.PARTIAL_FLOATS, device=device, dtype=torch.float32),
            torch.empty(slots, build.ROWS, device=device, dtype=torch.float32),
            torch.zeros(pairs, device=device, dtype=torch.int32),
        ]

    def __call__(
        self,
        query: Tensor,
        cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        transform: DecodeTransform,
        scale: float,
        *,
        query_start_loc: Tensor | None = None,
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
            query: bf16, fp16 or fp32 `[tokens, heads, D]`, channels contiguous.
            cache: uint8 `[pages, KV heads, page tokens, token bytes]`, see `formats`.
            block_table: int32 `[requests, pages]`, a row contiguous.
            seq_lens: int32 `[requests]`, new tokens included; 0 gives zeros (a padded request).
            transform: of the layer.
            scale: of the softmax.
            query_start_loc: int32 `[requests + 1]`: request r has the new tokens `query_start_loc[r]` to
                `query_start_loc[r + 1]`, at most the instance's `query_tokens` (that is not checked: it would wait for
                the GPU). None: `query_tokens` each. Rows of `out` of no request are left as they are.
            window: tokens a query sees, itself included; None for all.
            soft_cap: scores become `c tanh(score / c)`.
            sink_logits: fp32 `[heads]`: a logit that takes part in each row's softmax and has no value.
            hot, sink_tokens, recent_tokens: the exact tier, as `reference.attention` takes it; needs a build with it.
            out: as `query`; may have another dtype.

        Lengths, starts and tables (`hot.slot` too) must be complete before the kernel that precedes this one on the
        stream starts: they are read while that kernel ends. Raises `ValueError` for what does not fit.
        """
        out = torch.empty_like(query) if out is None else out
        _call(
            query,
            cache,
            block_table,
            seq_lens,
            query_start_loc,
            [transform.key.factor, transform.key.order, transform.key.matrix, transform.key_mean],
            [transform.value.factor, transform.value.order, transform.value.matrix],
            sink_logits,
            list(hot) if hot is not None else [],
            self._scratch,
            out,
            self.fmt.name,
            self.rows,
            [self.heads, self.kv_heads, self.head_size, self.max_requests, self.query_tokens],
            self.exact,
            self.bulk_copy,
            scale,
            soft_cap or 0.0,
            window or 0,
            sink_tokens,
            max(recent_tokens, 0),
        )
        return out


def _launch(
    query: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor | None,
    key: list[Tensor | None],
    value: list[Tensor | None],
    sink_logits: Tensor | None,
    hot: list[Tensor],
    scratch: list[Tensor],
    out: Tensor,
    fmt_name: str,
    rows: int,
    limits: list[int],
    exact: bool,
    bulk_copy: bool | None,
    scale: float,
    soft_cap: float,
    window: int,
    sink_tokens: int,
    recent_tokens: int,
) -> None:
    """Checks and launches. Takes tensors and plain values only, so that it can be a torch operator."""
    fmt, device, (heads, kv_heads, head_size, max_requests, query_tokens) = get_paged(fmt_name), query.device, limits
    build = _build(fmt_name, head_size, rows, exact, bulk_copy, device)
    (key_factor, key_order, key_matrix, key_mean), (value_factor, value_order, value_matrix) = key, value
    _check_tensors(query, cache, out, fmt, heads, kv_heads, head_size)
    _check_requests(query, block_table, seq_lens, query_start_loc, max_requests, query_tokens)
    if hot:
        _check_hot(hot, kv_heads, head_size, sink_tokens, recent_tokens, build.MAX_EXACT_UNITS)
    requests, tokens = seq_lens.shape[0], query.shape[0]
    if requests == 0 or tokens == 0:
        return
    tiles, weights, arrivals = scratch
    params, stream, ctas = build.DecodeParams(), stream_of(device), multiprocessors(device)

    params.cache, params.page_stride, params.head_stride = cache.data_ptr(), cache.stride(0), cache.stride(1)
    params.page_units = page_units = cache.shape[2] // UNIT_TOKENS
    params.page_magic = -(-(1 << 31) // page_units)
    params.block_table, params.table_stride = block_table.data_ptr(), block_table.stride(0)
    params.seq_lens = seq_lens.data_ptr()
    params.query_start_loc = address(query_start_loc)
    params.query, params.query_dtype = query.data_ptr(), _DTYPES[query.dtype]
    params.query_token_stride, params.query_head_stride = query.stride(0), query.stride(1)
    params.out, params.out_dtype = out.data_ptr(), _DTYPES[out.dtype]
    params.out_token_stride, params.out_head_stride = out.stride(0), out.stride(1)
    params.requests, params.kv_heads, params.group = requests, kv_heads, heads // kv_heads
    params.query_tokens, params.tile_rows = query_tokens, build.ROWS
    params.row_tiles = row_tiles = -(-params.group * query_tokens // build.ROWS)
    params.scale_log2, params.soft_cap_log2 = scale * LOG2_E, soft_cap * LOG2_E
    params.window = window
    params.sink_logits = address(sink_logits)
    params.key_inverse = _structured(key_factor, key_order)
    params.value_inverse = _structured(value_factor, value_order)
    params.key_mean = address(key_mean)
    if hot:
        params.hot_key, params.hot_value, params.hot_slot = (t.data_ptr() for t in hot)
        params.hot_slot_stride, params.hot_head_stride = hot[0].stride(0), hot[0].stride(1)
        params.sink_units, params.recent_tokens = -(-sink_tokens // UNIT_TOKENS), recent_tokens
    params.partial_tiles, params.partial_weights = tiles.data_ptr(), weights.data_ptr()
    params.arrivals = arrivals.data_ptr()
    params.negative_zero = _NEGATIVE_ZERO

    params.key_matrix, params.value_matrix = _dense(key_matrix), _dense(value_matrix)
    with torch.cuda.device(device):
        build.decode(params, ctas, _team_warps(build, requests * kv_heads * row_tiles / ctas), stream)


def _team_warps(build: ModuleType, pairs: float) -> int:
    """The size of teams for so many pairs a multiprocessor."""
    if pairs < _SMALL_TEAMS_FROM:
        return build.LARGE_TEAM
    return build.MEDIUM_TEAM if pairs < 2 * _SMALL_TEAMS_FROM else build.SMALL_TEAM


_call = traceable("decode", _launch, writes=("scratch", "out"))


def _structured(factor: Tensor | None, order: Tensor | None) -> tuple[int, int, int]:
    """A structured transform as the binding takes it: factor, order, elements between KV heads."""
    stride = 0 if factor is None or factor.shape[0] == 1 else factor.shape[1]
    return address(factor), address(order), stride


def _dense(fragments: Tensor | None) -> tuple[int, int]:
    """A dense transform as the binding takes it: fragments, elements between KV heads."""
    return address(fragments), 0 if fragments is None or fragments.shape[0] == 1 else fragments.stride(0)


def _check_tensors(
    query: Tensor, cache: Tensor, out: Tensor, fmt: Format, heads: int, kv_heads: int, head_size: int
) -> None:
    shape = (query.shape[0], heads, head_size)
    for name, tensor in (("query", query), ("out", out)):
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name}: dtype {tensor.dtype} is not supported: use one of {tuple(_DTYPES)}")
        if tensor.shape != shape or tensor.stride(2) != 1:
            raise ValueError(
                f"{name}: shape {tuple(tensor.shape)}, strides {tensor.stride()}: need {shape} with contiguous channels"
            )
    check_page_tokens(cache.shape[2])
    token_bytes = fmt.token_bytes(head_size)
    run = (kv_heads, cache.shape[2], token_bytes)
    if cache.dtype != torch.uint8 or cache.shape[1:] != run or cache.stride()[2:] != (token_bytes, 1):
        raise ValueError(
            f"cache: {cache.dtype} {tuple(cache.shape)}, strides {cache.stride()}: need uint8 [pages, {run[0]}, "
            f"page tokens, {token_bytes}] with the tokens of a page and head contiguous"
        )
    if cache.stride(0) % 16 or cache.stride(1) % 16 or cache.data_ptr() % 16:
        raise ValueError(f"cache: strides {cache.stride()} and address must be multiples of 16 bytes")


def _check_requests(
    query: Tensor, block_table: Tensor, seq_lens: Tensor, query_start_loc: Tensor | None, max_requests: int, most: int
) -> None:
    requests = seq_lens.shape[0]
    if requests > max_requests:
        raise ValueError(f"seq_lens: {requests} requests, but this instance was made for {max_requests}")
    tables = {"block_table": block_table, "seq_lens": seq_lens, "query_start_loc": query_start_loc}
    for name, table in tables.items():
        if table is not None and (table.dtype != torch.int32 or table.stride(-1) != 1):
            raise ValueError(f"{name}: need int32, the last dimension contiguous; got {table.dtype}")
    if block_table.shape[0] != requests:
        raise ValueError(f"block_table: {block_table.shape[0]} rows for {requests} requests")
    if query_start_loc is None and query.shape[0] != requests * most:
        raise ValueError(f"query: {query.shape[0]} tokens, need {most} for each of {requests} requests")
    if query_start_loc is not None and (len(query_start_loc) != requests + 1 or query.shape[0] > max_requests * most):
        raise ValueError(
            f"query_start_loc: {len(query_start_loc)} entries for {requests} requests, query: {query.shape[0]} tokens; "
            f"need {requests + 1} entries and at most {max_requests * most} tokens"
        )


def _check_hot(
    hot: list[Tensor], kv_heads: int, head_size: int, sink_tokens: int, recent_tokens: int, most_units: int
) -> None:
    units = -(-sink_tokens // UNIT_TOKENS) + -(-recent_tokens // UNIT_TOKENS) + 1
    if units > most_units:
        raise ValueError(
            f"recent_tokens, sink_tokens: {recent_tokens} and {sink_tokens} are {units} units, but this build keeps "
            f"{most_units}: ask for fewer, or for a build with the exact tier"
        )
    key, value, _ = hot
    for name, pool in (("hot.key", key), ("hot.value", value)):
        if pool.dtype != torch.bfloat16 or pool.shape[1:] != (kv_heads, UNIT_TOKENS, head_size):
            raise ValueError(f"{name}: {pool.dtype} {tuple(pool.shape)}: need bfloat16 [slots, KV heads, 16, D]")
        if pool.stride() != key.stride() or pool.stride()[2:] != (head_size, 1):
            raise ValueError(f"{name}: strides {pool.stride()}: both pools alike, units contiguous")
