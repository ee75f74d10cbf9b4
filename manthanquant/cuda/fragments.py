"""Matrices as `mma.m16n8k16` wants its B operand, in the order in which a warp's lanes load them."""

from __future__ import annotations

import torch
from torch import Tensor

from manthanquant.formats import LANES

BLOCK = 16  # channels of a matrix instruction's k, and of a pair of its n
CORE = 8  # rows and columns that lie together in shared memory


def b_fragments(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """T `[H, D out, D in]` as B fragments: `[H, D / 16 in, D / 16 out, lane, (n tile, register, element)]`.

    Lane 4 g + c of A holds channels 4 c to 4 c + 3 of a block of 16, and not those that the instruction itself would
    give it, 2 c, 2 c + 1, 2 c + 8 and 2 c + 9; of the product it does hold the latter.
    """
    size = matrix.shape[-1]
    lane = torch.arange(LANES).view(-1, 1, 1, 1)
    tile, register, element = (torch.arange(2).view(shape) for shape in ((-1, 1, 1), (-1, 1), (-1,)))
    group, column = lane // 4, lane % 4
    blocks = torch.arange(size // BLOCK) * BLOCK
    channel_in = 4 * column + 2 * register + element
    channel_out = 8 * tile + group
    return (
        matrix[:, blocks.view(-1, 1, 1, 1, 1) + channel_out, blocks.view(-1, 1, 1, 1, 1, 1) + channel_in]
        .flatten(-3)
        .to(dtype)
        .contiguous()
    )


def core_matrices(matrix: Tensor, dtype: torch.dtype, *, grouped_in: bool) -> Tensor:
    """T `[H, D out, D in]` as B in blocks of 8 x 8: `[H, D / 8 out, D / 8 in, out, in]`, for csrc/prefix.cu.

    Columns `out` are dealt so that lane 4 g + c of a product, which holds columns 2 c and 2 c + 1 of each block, has
    the 8 channels from 8 c on of each 32 (4 of each 16, where 32 do not divide the head).

    `grouped_in`: A's channels are those of `b_fragments`; otherwise the instruction's own.
    """
    size = matrix.shape[-1]
    blocks = 4 if size % (4 * CORE) == 0 else 2  # whose columns are dealt among them
    column, position = torch.arange(size), torch.arange(size)
    block, lane, element = column // CORE, column % CORE // 2, column % 2
    channel_out = block // blocks * blocks * CORE + 2 * blocks * lane + 2 * (block % blocks) + element
    channel_in = position
    if grouped_in:
        half, pair = position // CORE % 2, position % CORE
        channel_in = position // BLOCK * BLOCK + 4 * (pair // 2) + 2 * half + pair % 2
    dealt = matrix[:, channel_out[:, None], channel_in].to(dtype)
    return dealt.unflatten(2, (-1, CORE)).unflatten(1, (-1, CORE)).transpose(2, 3).contiguous()
