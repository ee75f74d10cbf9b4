import pytest
import torch

from manthanquant import formats
from manthanquant.transform import LayerTransform, default_transform, gain_transform, hadamard_transform
from manthanquant.vllm_plugin.sharding import heads_of_rank

HEADS, SIZE = 4, 64


def calibrated() -> LayerTransform:
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(SIZE, generator=generator) for _ in range(HEADS)])
    gain = torch.rand(HEADS, SIZE, generator=generator) + 0.5
    mean = torch.randn(HEADS, SIZE, generator=generator)
    fmt = formats.K42V3
    return LayerTransform(gain_transform(fmt, "key", order, gain, mean), hadamard_transform(fmt, "value", SIZE))


@pytest.mark.parametrize(
    ("world", "expected"), [(1, [[0, 1, 2, 3]]), (2, [[0, 1], [2, 3]]), (8, [[0], [0], [1], [1], [2], [2], [3], [3]])]
)
def test_each_rank_has_its_own_heads(world: int, expected: list[list[int]]) -> None:
    whole = calibrated()
    x = torch.randn(3, HEADS, SIZE)
    for rank, heads in enumerate(expected):
        part = heads_of_rank(whole, len(heads), rank, world)
        torch.testing.assert_close(part.key.apply(x[:, heads]), whole.key.apply(x)[:, heads])
        torch.testing.assert_close(part.value.apply(x[:, heads]), whole.value.apply(x)[:, heads])


def test_what_all_heads_share_stays_shared() -> None:
    shared = default_transform(formats.K42V3, SIZE)
    assert heads_of_rank(shared, 2, 1, 2).key is shared.key
