"""Matrices in the order of the tensor cores' operands, multiplied as those multiply them."""

from __future__ import annotations

import pytest
import torch

from manthanquant.cuda.fragments import BLOCK, CORE, core_matrices
from manthanquant.formats import SUPPORTED_HEAD_SIZES


@pytest.mark.parametrize("grouped_in", [False, True])
@pytest.mark.parametrize("head_size", SUPPORTED_HEAD_SIZES)
def test_core_matrices_multiply_as_the_matrix(head_size: int, grouped_in: bool) -> None:
    matrix, vectors = torch.randn(2, head_size, head_size).double(), torch.randn(2, 3, head_size).double()
    cores = core_matrices(matrix, torch.float64, grouped_in=grouped_in)
    assert cores.shape == (2, head_size // CORE, head_size // CORE, CORE, CORE)
    assert cores.is_contiguous()

    lanes = [(half, lane, element) for half in range(2) for lane in range(4) for element in range(2)]
    in_block = [4 * c + 2 * h + e if grouped_in else 8 * h + 2 * c + e for h, c, e in lanes]
    k = [block + channel for block in range(0, head_size, BLOCK) for channel in in_block]
    product = vectors[..., k] @ cores.transpose(2, 3).flatten(3).flatten(1, 2).transpose(1, 2)

    run = 8 if head_size % 32 == 0 else 4  # channels of a lane, two from each of run / 2 blocks of columns
    columns = product.unflatten(2, (-1, run // 2, 4, 2))  # [..., group, block, lane, element]
    assert torch.allclose(columns.transpose(3, 4).flatten(2), vectors @ matrix.transpose(1, 2))
