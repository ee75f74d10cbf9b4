"""What several suites feed to kernels."""

from __future__ import annotations

import math

import torch

from manthanquant.formats import Format
from manthanquant.transform import (
    LayerTransform,
    default_transform,
    dense_transform,
    gain_transform,
    hadamard_transform,
)


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
