import pytest
import torch

from manthanquant.codebook import codebook
from manthanquant.formats import PAGED_FORMATS, SIDES
from manthanquant.quantize import dequantize, quantize, scales_from_bytes, scales_to_bytes


def sphere_mse(bits, size):
    """Theory: error of a codebook on sqrt(n) times a coordinate of a uniform point on the sphere in n dimensions.

    The coordinate's density is proportional to (1 - x^2 / n)^((n - 3) / 2); N(0, 1) is its limit.
    """
    x = torch.linspace(-(size**0.5), size**0.5, 400_001, dtype=torch.float64)[1:-1]
    density = (1 - x * x / size) ** ((size - 3) / 2)
    levels = torch.tensor(codebook(bits).levels, dtype=torch.float64)
    error = (x - levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]) ** 2
    return ((density * error).sum() / density.sum()).item()


def test_the_spheres_error_tends_to_the_codebooks():
    assert sphere_mse(3, 100_000) == pytest.approx(codebook(3).distortion, rel=1e-3)


@pytest.mark.parametrize("fmt", PAGED_FORMATS.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("side", SIDES)
def test_distortion_on_gaussian_vectors_is_theorys(fmt, side):
    """Each class, with the plain norm as its scale, within 1%."""
    y = torch.randn(4000, 256, generator=torch.Generator().manual_seed(1))
    codes = quantize(y, fmt, side).codes
    segments = fmt.segments(side, 256)
    for bits, part, code in zip(fmt.bits(side), y.split(segments, 1), codes.split(segments, 1)):
        levels = torch.tensor(codebook(bits).levels)[code.long()]
        unit = part * (part.shape[1] ** 0.5 / part.norm(dim=1, keepdim=True))
        assert ((unit - levels) ** 2).mean().item() == pytest.approx(sphere_mse(bits, part.shape[1]), rel=0.01)


@pytest.mark.parametrize("fmt", PAGED_FORMATS.values(), ids=lambda f: f.name)
def test_scales_make_inner_products_unbiased(fmt):
    torch.manual_seed(2)
    y = torch.randn(2000, 128) * torch.rand(2000, 1) * 10
    coded = quantize(y, fmt, "key")
    again = dequantize(coded.codes, coded.scale_bytes, fmt, "key")
    ratio = (y * again).sum(1) / (y * y).sum(1)
    step = 1e-3 if len(fmt.key_bits) == 1 else 1 / 16  # fp16 or e4m4 rounding of the scale
    assert ratio.mean().item() == pytest.approx(1, abs=step / 20)
    assert (ratio - 1).abs().max().item() < step


@pytest.mark.parametrize("fmt", PAGED_FORMATS.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("side", SIDES)
def test_zero_and_non_finite_vectors_come_back_as_zero(fmt, side):
    y = torch.randn(5, 64)
    y[1] = 0
    y[2, 7] = float("nan")
    y[3, 0] = float("-inf")
    coded = quantize(y, fmt, side)
    assert coded.finite.tolist() == [True, True, False, False, True]
    again = dequantize(coded.codes, coded.scale_bytes, fmt, side)
    assert torch.equal(again[1:4], torch.zeros(3, 64))
    assert torch.cosine_similarity(again[[0, 4]], y[[0, 4]], dim=1).min() > 0.9


def test_fp16_scales_saturate():
    assert scales_from_bytes(scales_to_bytes(torch.tensor([[1e9]])), 1).item() == 65504


def test_e4m4_scales_round_to_nearest_and_saturate():
    scale = torch.logspace(-2, 2, 4001)[:, None].expand(-1, 2)
    again = scales_from_bytes(scales_to_bytes(scale), 2)
    normal = (scale >= 2.0**-8) & (scale <= 124)
    assert ((again / scale - 1).abs()[normal] <= 1 / 32 + 1e-3).all()
    assert scales_from_bytes(scales_to_bytes(torch.tensor([[1e9, 0.0]])), 2).tolist() == [[124.0, 0.0]]
    every = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 2)
    assert torch.equal(scales_to_bytes(scales_from_bytes(every, 2)), every)
