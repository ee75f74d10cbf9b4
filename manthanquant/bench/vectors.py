"""The seed format's codec on [N, 128] vectors, beside the same in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from manthanquant import vectors
from manthanquant.bench.result import OURS, Result
from manthanquant.bench.timing import eager_milliseconds, milliseconds
from manthanquant.cuda import vectors as gpu
from manthanquant.formats import SEED3

HEAD_SIZE = 128
SIZES = (2048, 1 << 20)
SET_BYTES = 256 << 20  # of inputs taken in turn
MOST_SETS = 16


def run(peers: bool) -> Iterator[Result]:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        for count in SIZES:
            yield from _ours(count, dtype)
    if peers:
        yield from _pytorch(SIZES[0], torch.bfloat16)


def _moved(count: int, dtype: torch.dtype) -> int:
    return count * (HEAD_SIZE * dtype.itemsize + SEED3.vector_bytes(HEAD_SIZE))


def _result(operation: str, count: int, dtype: torch.dtype, subject: str, time: float) -> Result:
    case = f"{operation} N={count}, D={HEAD_SIZE}, {str(dtype).removeprefix('torch.')}"
    return Result("vectors", case, subject, time, _moved(count, dtype), f"{count / time / 1e3:,.0f} M vectors/s")


def _ours(count: int, dtype: torch.dtype) -> Iterator[Result]:
    sets = max(2, min(MOST_SETS, SET_BYTES // _moved(count, dtype)))
    inputs = [torch.randn(count, HEAD_SIZE, device="cuda").to(dtype) for _ in range(sets)]
    coded = [gpu.encode(x) for x in inputs]
    encode = milliseconds([partial(gpu.encode, x) for x in inputs])
    decode = milliseconds([partial(gpu.decode, codes, radius, HEAD_SIZE, dtype) for codes, radius in coded])
    yield _result("encode", count, dtype, OURS, encode)
    yield _result("decode", count, dtype, OURS, decode)


def _pytorch(count: int, dtype: torch.dtype) -> Iterator[Result]:
    """The reference on the same GPU, eager: it cannot be captured in a graph."""
    x = torch.randn(count, HEAD_SIZE, device="cuda").to(dtype)
    codes, radius = vectors.encode_seed_reference(x)
    encode = eager_milliseconds(lambda: vectors.encode_seed_reference(x))
    decode = eager_milliseconds(lambda: vectors.decode_seed_reference(codes, radius, HEAD_SIZE).to(dtype))
    yield _result("encode", count, dtype, "PyTorch", encode)
    yield _result("decode", count, dtype, "PyTorch", decode)
