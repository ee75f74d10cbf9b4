"""A layer's transform for the KV heads of one tensor-parallel rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from manthanquant.transform import LayerTransform, SideTransform


def heads_of_rank(transform: LayerTransform, kv_heads: int, rank: int, world: int) -> LayerTransform:
    """`transform` of all heads -> that of the `kv_heads` heads that `rank` of `world` ranks holds.

    vLLM gives each rank consecutive heads, and one head to several ranks where there are more ranks than heads. What
    is shared by all heads stays shared.
    """
    return LayerTransform(*(_side(side, kv_heads, rank, world) for side in (transform.key, transform.value)))


def _side(side: SideTransform, kv_heads: int, rank: int, world: int) -> SideTransform:
    tensors: dict[str, Any] = {name: x for name, x in vars(side).items() if isinstance(x, Tensor)}
    total = max(x.shape[0] for x in tensors.values())
    if total in (1, kv_heads):
        return side
    first = rank * total // world
    return replace(side, **{name: x[first : first + kv_heads] for name, x in tensors.items() if x.shape[0] == total})
