"""What a key or value meets before it is coded: nothing, a Hadamard rotation, or a calibrated transform.

A side of one layer maps `x` to `y = (x - mean) T^T`, row vectors, one `T [D, D]` a KV head. Codes hold `y`. The decode
kernel never undoes it: queries take `T^-T` for keys once a step (`q . k = (q T^-1) . y + q . mean`, and the last term
is the same for every key of a row, so the softmax drops it), and the attention output takes the value side's inverse.

Kinds:

* `none`: T is the identity.
* `hadamard`: T = H diag(s), with s fixed random signs and H the orthonormal Hadamard matrix of each segment (a format
  with two code widths has two segments). Where a segment is no power of two, H is block diagonal with blocks of the
  largest power of two that divides it. Needs no calibration.
* `gain`: channels are reordered by importance and scaled, then rotated: T = H diag(s) diag(gain) P.
* `dense`: T = H diag(s) M with M any invertible matrix.

Keys, queries, values: fp32 here; kernels say what they round.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from manthanquant.formats import Format, Side

Kind = Literal["none", "hadamard", "gain", "dense"]
SIGN_SEED = 0x6D616E7468616E71
_MASK64 = (1 << 64) - 1


def signs(count: int, side: Side) -> tuple[int, ...]:
    """`count` fixed signs, +1 or -1: the top bit of splitmix64 (Steele et al. 2014), seeded by the side."""
    state = SIGN_SEED + (0 if side == "key" else 1)
    out = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & _MASK64
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
        out.append(1 - 2 * ((z ^ (z >> 31)) >> 63))
    return tuple(out)


def hadamard_block(segment: int) -> int:
    """The largest power of two that divides `segment`."""
    return segment & -segment


def rotation_factor(fmt: Format, side: Side, head_size: int) -> Tensor:
    """What `hadamard` transforms multiply each channel by around sums and differences: sign and norm, fp32 `[D]`."""
    norm = [hadamard_block(n) ** -0.5 for n in fmt.segments(side, head_size) for _ in range(n)]
    return torch.tensor(norm) * torch.tensor(signs(head_size, side))


def hadamard(order: int) -> Tensor:
    """The orthonormal Sylvester-Hadamard matrix, fp64 `[order, order]`; `order` is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / order**0.5


@cache
def rotation(segments: tuple[int, ...], side: Side) -> Tensor:
    """H diag(s) for a head of `sum(segments)` channels: orthonormal, fp64 `[D, D]`, `y = x @ rotation.T`."""
    blocks = []
    for segment in segments:
        block = hadamard_block(segment)
        blocks += [hadamard(block)] * (segment // block)
    return torch.block_diag(*blocks) * torch.tensor(signs(sum(segments), side), dtype=torch.float64)


@dataclass(frozen=True)
class SideTransform:
    """One side of one layer.

    Attributes:
        kind: see the module's docstring.
        forward: fp32 `[KV heads or 1, D, D]`, the T above.
        inverse: fp32, same shape: T^-1.
        mean: fp32 `[KV heads, D]`, taken off before T; None for none.
        order: int64 `[KV heads, D]`, `gain` only: channel `order[i]` of x comes i-th.
        gain: fp32 `[KV heads, D]`, `gain` only, in the new order.
    """

    kind: Kind
    forward: Tensor
    inverse: Tensor
    mean: Tensor | None = None
    order: Tensor | None = None
    gain: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """Exact vectors `[T, KV heads, D]` -> what is coded, fp32."""
        x = x.float()
        if self.mean is not None:
            x = x - self.mean
        return torch.einsum("thd,hed->the", x, self.forward.expand(x.shape[1], -1, -1))

    def undo(self, y: Tensor, *, with_mean: bool = True) -> Tensor:
        """What was coded, `[T, KV heads, D]` -> fp32 vectors in the model's own space."""
        x = torch.einsum("the,hde->thd", y, self.inverse.expand(y.shape[1], -1, -1))
        return x + self.mean if with_mean and self.mean is not None else x

    def apply_to_query(self, query: Tensor) -> Tensor:
        """Queries `[T, heads, D]` -> `q T^-1`, fp32, so that `result . y = q . (x - mean)`. Key side only."""
        tokens, heads, size = query.shape
        kv_heads = self.inverse.shape[0]
        grouped = query.float().view(tokens, kv_heads, heads // kv_heads, size)
        return torch.einsum("thgd,hde->thge", grouped, self.inverse).reshape(tokens, heads, size)

    def undo_output(self, output: Tensor) -> Tensor:
        """Attention output over coded values `[T, heads, D]` -> the model's own space, fp32. Value side only."""
        tokens, heads, size = output.shape
        kv_heads = self.inverse.shape[0]
        grouped = output.float().view(tokens, kv_heads, heads // kv_heads, size)
        return torch.einsum("thge,hde->thgd", grouped, self.inverse).reshape(tokens, heads, size)

    def to(self, device: torch.device | str) -> SideTransform:
        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        return SideTransform(
            self.kind,
            self.forward.to(device),
            self.inverse.to(device),
            move(self.mean),
            move(self.order),
            move(self.gain),
        )


@dataclass(frozen=True)
class LayerTransform:
    """Both sides of one layer."""

    key: SideTransform
    value: SideTransform

    def to(self, device: torch.device | str) -> LayerTransform:
        return LayerTransform(self.key.to(device), self.value.to(device))


def identity(head_size: int) -> SideTransform:
    eye = torch.eye(head_size, dtype=torch.float32)[None]
    return SideTransform("none", eye, eye)


def hadamard_transform(fmt: Format, side: Side, head_size: int, mean: Tensor | None = None) -> SideTransform:
    """The transform that needs no calibration; `mean` `[KV heads, D]` may still be taken off the keys."""
    matrix = rotation(fmt.segments(side, head_size), side)
    return SideTransform("hadamard", matrix.float()[None], matrix.T.float().contiguous()[None], mean)


def gain_transform(fmt: Format, side: Side, order: Tensor, gain: Tensor, mean: Tensor | None = None) -> SideTransform:
    """`gain` kind from `order` int64 and `gain` fp32 (in the new order), both `[KV heads, D]`; gains are positive.

    Gains are rounded to bf16, so that the store's matrix instructions apply them exactly.
    """
    if not bool((gain > 0).all()):
        raise ValueError("gain: every gain must be positive and finite")
    gain = gain.bfloat16().float()
    size = order.shape[1]
    permutation = torch.nn.functional.one_hot(order, size).double()  # [Hk, D, D]: row i picks channel order[i]
    rotate = rotation(fmt.segments(side, size), side)
    forward = rotate @ (gain.double()[..., None] * permutation)
    inverse = (permutation / gain.double()[..., None]).transpose(1, 2) @ rotate.T
    return SideTransform("gain", forward.float(), inverse.float(), mean, order, gain.float())


def dense_transform(fmt: Format, side: Side, matrix: Tensor, mean: Tensor | None = None) -> SideTransform:
    """`dense` kind from `matrix` `[KV heads, D, D]`, the M above (rows most important first).

    T is rounded to bf16, so that the store's matrix instructions apply it exactly, and the inverse is of what was
    rounded: nothing is lost.
    """
    size = matrix.shape[-1]
    forward = (rotation(fmt.segments(side, size), side) @ matrix.double()).bfloat16().double()
    return SideTransform("dense", forward.float(), torch.linalg.inv(forward).float(), mean)


def default_transform(fmt: Format, head_size: int) -> LayerTransform:
    """Hadamard on both sides, no mean: what serves without a calibration."""
    return LayerTransform(*(hadamard_transform(fmt, side, head_size) for side in ("key", "value")))
