import pytest
import torch

from manthanquant.formats import PAGED_FORMATS, SIDES, SUPPORTED_HEAD_SIZES
from manthanquant.transform import (
    dense_transform,
    gain_transform,
    hadamard_block,
    hadamard_transform,
    identity,
    rotation,
    signs,
)

KV_HEADS, GROUP = 2, 3


def every_kind(fmt, side, head_size):
    torch.manual_seed(3)
    mean = torch.randn(KV_HEADS, head_size) if side == "key" else None
    order = torch.stack([torch.randperm(head_size) for _ in range(KV_HEADS)])
    gain = torch.rand(KV_HEADS, head_size) + 0.5
    matrix = torch.randn(KV_HEADS, head_size, head_size) / head_size**0.5 + torch.eye(head_size)
    return {
        "none": identity(head_size),
        "hadamard": hadamard_transform(fmt, side, head_size, mean),
        "gain": gain_transform(fmt, side, order, gain, mean),
        "dense": dense_transform(fmt, side, matrix, mean),
    }


@pytest.mark.parametrize("head_size", SUPPORTED_HEAD_SIZES)
@pytest.mark.parametrize("segments", ["one", "two"])
def test_rotation_is_orthonormal_and_keeps_segments_apart(head_size, segments):
    fmt = PAGED_FORMATS["k3v3" if segments == "one" else "k42v3"]
    parts = fmt.segments("key", head_size)
    matrix = rotation(parts, "key")
    assert torch.allclose(matrix @ matrix.T, torch.eye(head_size, dtype=torch.float64), atol=1e-12)
    if len(parts) == 2:
        assert not matrix[: parts[0], parts[0] :].any() and not matrix[parts[0] :, : parts[0]].any()
    assert hadamard_block(96) == 32 and hadamard_block(80) == 16 and hadamard_block(128) == 128


def test_signs_are_fixed_for_all_time():
    """A stored cache or calibration depends on them, so these literals may never change."""
    assert signs(16, "key") == (-1, -1, -1, -1, -1, 1, 1, 1, -1, -1, 1, 1, 1, 1, 1, 1)
    assert signs(16, "value") == (1, 1, 1, 1, 1, -1, 1, 1, -1, -1, 1, -1, 1, 1, -1, -1)


@pytest.mark.parametrize("kind", ["none", "hadamard", "gain", "dense"])
@pytest.mark.parametrize("side", SIDES)
def test_undo_is_the_inverse(kind, side):
    t = every_kind(PAGED_FORMATS["k42v42"], side, 64)[kind]
    x = torch.randn(5, KV_HEADS, 64)
    assert torch.allclose(t.undo(t.apply(x)), x, atol=1e-3)  # fp32, times the dense matrix's condition


@pytest.mark.parametrize("kind", ["none", "hadamard", "gain", "dense"])
def test_queries_meet_transformed_keys(kind):
    """q T^-1 . T (k - mean) = q . k - q . mean, for every query head of the group."""
    t = every_kind(PAGED_FORMATS["k42v3"], "key", 64)[kind]
    query, key = torch.randn(4, KV_HEADS * GROUP, 64), torch.randn(7, KV_HEADS, 64)
    mean = torch.zeros(KV_HEADS, 64) if t.mean is None else t.mean
    wide = (key - mean).repeat_interleave(GROUP, 1)
    expected = torch.einsum("qhd,khd->hqk", query, wide)
    turned = t.apply_to_query(query)
    got = torch.einsum("qhd,khd->hqk", turned, t.apply(key).repeat_interleave(GROUP, 1))
    assert torch.allclose(got, expected, atol=1e-3)


@pytest.mark.parametrize("kind", ["none", "hadamard", "gain", "dense"])
def test_output_is_turned_back(kind):
    t = every_kind(PAGED_FORMATS["k42v42"], "value", 64)[kind]
    value, weight = torch.randn(7, KV_HEADS, 64), torch.rand(KV_HEADS * GROUP, 7)
    expected = torch.einsum("hk,khd->hd", weight, value.repeat_interleave(GROUP, 1))[None]
    got = torch.einsum("hk,khd->hd", weight, t.apply(value).repeat_interleave(GROUP, 1))[None]
    assert torch.allclose(t.undo_output(got), expected, atol=1e-3)


def test_gains_must_be_positive():
    order = torch.arange(64)[None]
    with pytest.raises(ValueError, match="every gain must be positive"):
        gain_transform(PAGED_FORMATS["k42v3"], "key", order, torch.zeros(1, 64))
