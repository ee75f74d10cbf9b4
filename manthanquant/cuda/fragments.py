"""Matrices as `mma.m16n8k16` wants its B operand, in the order in which a warp's lanes load them."""

from __future__ import annotations

import torch
from torch import Tensor

from manthanquant.formats import LANES

BLOCK = 16  # channels of a matrix instruction's k, and of a pair of its n


def b_fragments(matrix: Tensor, dtype: torch.dtype, *, grouped_in: bool, grouped_out: bool) -> Tensor:
    """T `[H, D out, D in]` as B fragments: `[H, D / 16 in, D / 16 out, lane, (n tile, register, element)]`.

    Grouped: lane 4 g + c holds channels 4 c to 4 c + 3 of a block of 16 (of the A operand, or of the product).
    Otherwise it holds 2 c, 2 c + 1, 2 c + 8 and 2 c + 9, which is the instruction's own order.
    """
    size = matrix.shape[-1]
    lane = torch.arange(LANES).view(-1, 1, 1, 1)
    tile, register, element = (torch.arange(2).view(shape) for shape in ((-1, 1, 1), (-1, 1), (-1,)))
    group, column = lane // 4, lane % 4
    blocks = torch.arange(size // BLOCK) * BLOCK
    channel_in = 4 * column + 2 * register + element if grouped_in else 2 * column + 8 * register + element
    channel_out = 4 * (group // 2) + 2 * tile + group % 2 if grouped_out else 8 * tile + group
    return (
        matrix[:, blocks.view(-1, 1, 1, 1, 1) + channel_out, blocks.view(-1, 1, 1, 1, 1, 1) + channel_in]
        .flatten(-3)
        .to(dtype)
        .contiguous()
    )
