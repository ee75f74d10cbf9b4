"""The CPU extension for one format and head size, with the signatures of `reference`.

The extension takes addresses and strides, so this module is where tensors are checked: what it lets through, the C++
may trust, page numbers and slots excepted, which it checks itself (`IndexError`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manthanquant import jit
from manthanquant.contract import KernelReport
from manthanquant.formats import UNIT_TOKENS, Format
from manthanquant.jit.kernels import cpu_extension
from manthanquant.reference import HotPool
from manthanquant.transform import LayerTransform

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # cpu_simd.h: Dtype
_NO_HOT = (0, 0, 0)
_NO_ROWS: tuple[int, ...] = (0, 0, 0, 0, 0)


class _Prepared(NamedTuple):
    """A layer's transform as the extension reads it. The tuples hold addresses into the tensors, kept alive here."""

    key_forward: tuple[int, int]
    value_forward: tuple[int, int]
    key_inverse: tuple[int, int]
    value_inverse: tuple[int, int]
    key_mean: int
    tensors: tuple[Tensor | None, ...]


def _prepare(transform: LayerTransform) -> _Prepared:
    if transform.value.mean is not None:
        raise ValueError("transform.value.mean: the value side has a mean, which no kernel adds back: leave it out")

    def contiguous(matrix: Tensor) -> Tensor:
        return matrix.to("cpu", torch.float32).contiguous()

    matrices = [
        contiguous(transform.key.forward.transpose(1, 2)),
        contiguous(transform.value.forward.transpose(1, 2)),
        contiguous(transform.key.inverse),
        contiguous(transform.value.inverse.transpose(1, 2)),
    ]
    mean = None if transform.key.mean is None else contiguous(transform.key.mean)
    key_forward, value_forward, key_inverse, value_inverse = (
        (m.data_ptr(), m[0].numel() if m.shape[0] > 1 else 0) for m in matrices
    )
    return _Prepared(
        key_forward,
        value_forward,
        key_inverse,
        value_inverse,
        key_mean=0 if mean is None else mean.data_ptr(),
        tensors=(*matrices, mean),
    )


def _rows(name: str, x: Tensor, heads: int | None, head_size: int) -> tuple[int, ...]:
    """Address, dtype and strides of `[tokens, heads, head size]`, checked."""
    if x.dim() != 3 or x.shape[2] != head_size or (heads is not None and x.shape[1] != heads):
        want = f"[tokens, {'heads' if heads is None else heads}, {head_size}]"
        raise ValueError(f"{name}: shape {tuple(x.shape)}, expected {want}")
    dtype = _DTYPES.get(x.dtype)
    if dtype is None or x.device.type != "cpu":
        raise ValueError(f"{name}: {x.dtype} on {x.device}, expected float32, bfloat16 or float16 on the CPU")
    return (x.data_ptr(), dtype, *x.stride())


def _indices(name: str, x: Tensor, dtype: torch.dtype) -> int:
    if x.dtype != dtype or x.device.type != "cpu" or x.stride(-1) != 1:
        raise ValueError(
            f"{name}: {x.dtype} on {x.device} with strides {x.stride()}, expected {dtype}, contiguous, CPU"
        )
    return x.data_ptr()


class CpuKernels:
    """Store and attention in C++. Thread-safe; uses as many threads as PyTorch's OpenMP does."""

    def __init__(self, module: Any, fmt: Format, head_size: int, report: KernelReport) -> None:
        self.report = report
        self._store: Callable[..., int] = module.store
        self._attention: Callable[..., None] = module.attention
        self._format = fmt
        self._head_size = head_size
        self._token_bytes = fmt.token_bytes(head_size)
        self._prepared: dict[int, _Prepared] = {}

    def store(
        self,
        key: Tensor,
        value: Tensor,
        cache: Tensor,
        slot_mapping: Tensor,
        transform: LayerTransform,
        hot: HotPool | None = None,
        hot_slots: Tensor | None = None,
    ) -> int:
        """`reference.store`; vectors that are not finite are zero in the hot pool too."""
        tokens, kv_heads = slot_mapping.shape[0], cache.shape[1]
        if key.shape[0] < tokens or value.shape[0] < tokens:
            raise ValueError(f"slot_mapping: {tokens} tokens, but key has {key.shape[0]} and value {value.shape[0]}")
        prepared = self._of(transform, kv_heads)
        pool, copies = _NO_HOT, 0
        if hot is not None and hot_slots is not None:
            if hot_slots.shape[0] < tokens:
                raise ValueError(f"hot_slots: {hot_slots.shape[0]} tokens, slot_mapping has {tokens}")
            pool, copies = self._hot(hot, kv_heads), _indices("hot_slots", hot_slots, torch.int64)
        return self._store(
            _rows("key", key, kv_heads, self._head_size),
            _rows("value", value, kv_heads, self._head_size),
            self._cache(cache),
            pool,
            _indices("slot_mapping", slot_mapping, torch.int64),
            copies,
            tokens,
            kv_heads,
            prepared.key_forward,
            prepared.value_forward,
            prepared.key_mean,
        )

    def attention(
        self,
        query: Tensor,
        cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        query_start_loc: Tensor,
        transform: LayerTransform,
        scale: float,
        *,
        window: int | None = None,
        soft_cap: float | None = None,
        sink_tokens: int = 0,
        recent_tokens: int = 0,
        hot: HotPool | None = None,
        chunk: tuple[Tensor, Tensor] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """`reference.attention`, into `out` `[T, heads, D]` of any float dtype if given; `chunk` as in `ops`.

        Tokens of `query` past the last request's end are left as they are in `out`.
        """
        heads, kv_heads, requests = query.shape[1], cache.shape[1], seq_lens.shape[0]
        if heads % kv_heads:
            raise ValueError(f"query: {heads} heads are no multiple of the cache's {kv_heads}")
        if block_table.shape[0] < requests or query_start_loc.shape[0] < requests + 1:
            raise ValueError(
                f"seq_lens: {requests} requests, but block_table has {block_table.shape[0]} rows and "
                f"query_start_loc {query_start_loc.shape[0]} entries"
            )
        if out is None:
            out = torch.zeros(query.shape, dtype=torch.float32)
        elif out.shape != query.shape:
            raise ValueError(f"out: shape {tuple(out.shape)}, query has {tuple(query.shape)}")
        chunk_rows = [_NO_ROWS, _NO_ROWS]
        if chunk is not None:
            chunk_rows = [_rows("chunk", x, kv_heads, self._head_size) for x in chunk]
            if min(x.shape[0] for x in chunk) < query.shape[0]:
                raise ValueError(
                    f"chunk: {chunk[0].shape[0]} keys, {chunk[1].shape[0]} values, {query.shape[0]} queries"
                )
        prepared = self._of(transform, kv_heads)
        self._attention(
            _rows("query", query, None, self._head_size),
            _rows("out", out, None, self._head_size),
            *chunk_rows,
            self._cache(cache),
            _NO_HOT if hot is None else self._hot(hot, kv_heads),
            0 if hot is None else _indices("hot.slot", hot.slot, torch.int32),
            _indices("block_table", block_table, torch.int32),
            block_table.stride(0),
            block_table.shape[1],
            _indices("seq_lens", seq_lens, torch.int32),
            _indices("query_start_loc", query_start_loc, torch.int32),
            requests,
            heads,
            kv_heads,
            query.shape[0],
            prepared.key_inverse,
            prepared.value_inverse,
            prepared.key_mean,
            scale,
            soft_cap or 0.0,
            window or 0,
            sink_tokens,
            recent_tokens,
        )
        return out

    def _cache(self, cache: Tensor) -> tuple[int, int, int, int, int]:
        pages, _, tokens, size = cache.shape
        page_stride, head_stride, token_stride, byte_stride = cache.stride()
        whole = cache.dtype == torch.uint8 and tokens % UNIT_TOKENS == 0 and byte_stride == 1
        if not whole or size != self._token_bytes or token_stride != size:
            raise ValueError(
                f"cache: {cache.dtype} of shape {tuple(cache.shape)} and strides {cache.stride()}, expected uint8 "
                f"[pages, KV heads, a multiple of {UNIT_TOKENS} tokens, {self._token_bytes}] with tokens contiguous"
            )
        return cache.data_ptr(), pages, page_stride, head_stride, tokens

    def _hot(self, hot: HotPool, kv_heads: int) -> tuple[int, int, int]:
        key, value = hot.key, hot.value
        shape = (key.shape[0], kv_heads, UNIT_TOKENS, self._head_size)
        if key.shape != shape or value.shape != shape or key.dtype != torch.bfloat16 or value.dtype != torch.bfloat16:
            raise ValueError(
                f"hot: {key.dtype} {tuple(key.shape)}, expected bfloat16 [slots, {shape[1]}, 16, {shape[3]}]"
            )
        if not (key.is_contiguous() and value.is_contiguous()):
            raise ValueError("hot: the pool must be contiguous")
        return key.data_ptr(), value.data_ptr(), shape[0]

    def _of(self, transform: LayerTransform, kv_heads: int) -> _Prepared:
        """The prepared transform; made once for each `LayerTransform` and dropped with it."""
        found = self._prepared.get(id(transform))
        if found is None:
            for side in (transform.key, transform.value):
                if side.forward.shape[0] not in (1, kv_heads) or side.forward.shape[1] != self._head_size:
                    raise ValueError(
                        f"transform: matrices of shape {tuple(side.forward.shape)} for {kv_heads} KV heads of size "
                        f"{self._head_size}"
                    )
            found = self._prepared[id(transform)] = _prepare(transform)
            weakref.finalize(transform, self._prepared.pop, id(transform), None)
        return found


def load(fmt: Format, head_size: int, arch: jit.Arch | None = None, cache_dir: Path | None = None) -> CpuKernels:
    """The kernels for `arch` (default: this machine's), built if need be. Raises `jit.JitError`."""
    extension = cpu_extension(fmt, head_size)
    result = jit.obtain(extension, arch or jit.detect_cpu(), cache_dir=cache_dir)
    report = KernelReport(result.arch, result.source, result.digest, result.seconds, result.message)
    return CpuKernels(jit.load(extension.name, result), fmt, head_size, report)
