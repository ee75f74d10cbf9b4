"""The seed format's codec on a GPU: one launch to encode, one to decode, the reference's bytes."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from manthanquant.cuda.module import module_for, stream_of
from manthanquant.formats import SEED3
from manthanquant.jit.kernels import vectors_extension

WORD_BYTES = 4


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """CUDA vectors `[N, D]`, bf16, fp16 or fp32 -> codes uint8 `[N, code bytes]` and radius bytes uint8 `[N, 4]`.

    Does not synchronise. A vector that is not finite, or whose squared norm overflows fp32, gets a radius that is not
    finite. Vectors whose elements are not contiguous are copied first.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    count, size = x.shape
    codes = torch.empty(count, SEED3.code_bytes(size), dtype=torch.uint8, device=x.device)
    radius = torch.empty(count, SEED3.radius_bytes, dtype=torch.uint8, device=x.device)
    with torch.cuda.device(x.device):
        module = module_for(vectors_extension(), x.device)
        params = _params(module, x.dtype, count, size, x.stride(0))
        module.encode(stream_of(x.device), params, x.data_ptr(), codes.data_ptr(), radius.data_ptr())
    return codes, radius


def decode(codes: Tensor, radius: Tensor, head_size: int, dtype: torch.dtype) -> Tensor:
    """Inverse of `encode`: vectors `[N, D]` of `dtype`. Does not synchronise."""
    codes, radius = codes.contiguous(), radius.contiguous()
    count = codes.shape[0]
    x = torch.empty(count, head_size, dtype=dtype, device=codes.device)
    with torch.cuda.device(codes.device):
        module = module_for(vectors_extension(), codes.device)
        params = _params(module, dtype, count, head_size, head_size)
        module.decode(stream_of(codes.device), params, codes.data_ptr(), radius.data_ptr(), x.data_ptr())
    return x


def _params(module: ModuleType, dtype: torch.dtype, count: int, size: int, row_stride: int) -> Any:
    kind = getattr(module.VectorType, str(dtype).removeprefix("torch."))
    words = SEED3.code_bytes(size) // WORD_BYTES
    return module.VectorParams(kind, count, size, row_stride, words, math.sqrt(size), size**-0.5)
