"""What several suites feed to kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manthanquant.formats import SIDES, Format
from manthanquant.packing import pages_as_units
from manthanquant.quantize import scales_to_bytes
from manthanquant.transform import (
    LayerTransform,
    default_transform,
    dense_transform,
    gain_transform,
    hadamard_transform,
)


def random_cache(fmt: Format, shape: tuple[int, int, int], head_size: int) -> Tensor:
    """Random codes under plausible scales, on the GPU; `shape`: pages, KV heads, page tokens."""
    size = (*shape, fmt.token_bytes(head_size))
    words = torch.randint(-(2**31), 2**31, (math.prod(size) // 4,), dtype=torch.int32, device="cuda")
    cache = words.view(torch.uint8).view(size)
    units = pages_as_units(cache, fmt, head_size)
    scales = units[..., fmt.scale_offset(head_size) :].unflatten(-1, (8, 2, 2, 2))  # token % 8, side, token / 8, bytes
    for index, side in enumerate(SIDES):
        classes = len(fmt.bits(side))
        random = 0.3 + 0.6 * torch.rand(*scales.shape[:4], 2, classes, device="cuda")
        scales[..., index, :, :] = scales_to_bytes(random)
    return cache


def random_transform(kind: str, fmt: Format, kv_heads: int, head_size: int) -> LayerTransform:
    """Random transforms. `gain` is for keys, beside Hadamard values, as calibration makes it; `dense` for both."""
    if kind == "hadamard":
        return default_transform(fmt, head_size)
    mean = torch.randn(kv_heads, head_size)
    if kind == "gain":
        order = torch.stack([torch.randperm(head_size) for _ in range(kv_heads)])
        key = gain_transform(fmt, "key", order, torch.rand(kv_heads, head_size) + 0.5, mean)
        return LayerTransform(key, hadamard_transform(fmt, "value", head_size))
    matrix = torch.randn(2, kv_heads, head_size, head_size) / math.sqrt(head_size) + torch.eye(head_size)
    return LayerTransform(dense_transform(fmt, "key", matrix[0], mean), dense_transform(fmt, "value", matrix[1]))
