import pytest
import torch

import manthanquant
from manthanquant import formats


@pytest.mark.parametrize(("head_size", "nbytes", "ratio"), [(128, 52, 4.92), (256, 100, 5.12)])
def test_the_seeds_table(head_size, nbytes, ratio):
    """Bytes, ratio, cosine similarity and mean squared error that the seed system states for its own layout."""
    x = torch.randn(4096, head_size, generator=torch.Generator().manual_seed(0))
    encoded = manthanquant.encode(x)
    again = manthanquant.decode(encoded)
    assert encoded.nbytes == nbytes * 4096 and encoded.ratio == pytest.approx(ratio, abs=0.005)
    assert torch.cosine_similarity(x, again, dim=1).mean().item() == pytest.approx(0.983, abs=0.0005)
    # 0.03455 is the quantiser's error on N(0, 1); a vector on a sphere of D dimensions falls short by about 2 / D.
    unit = x * (head_size**0.5 / x.norm(dim=1, keepdim=True))
    error = ((unit - again * (head_size**0.5 / x.norm(dim=1, keepdim=True))) ** 2).mean().item()
    assert error == pytest.approx(0.03455 * (1 - 2 / head_size), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["seed3", "mq3", "k3v3", "k42v42", "k4v4"])
def test_every_format_and_dtype(name, dtype):
    x = torch.randn(33, 128).to(dtype)
    again = manthanquant.decode(manthanquant.encode(x, format=name))
    assert again.dtype == dtype and again.shape == x.shape
    assert torch.cosine_similarity(x.float(), again.float(), dim=1).mean() > 0.96


def test_strides_do_not_matter():
    x = torch.randn(128, 40).T
    strided, contiguous = (manthanquant.decode(manthanquant.encode(a)) for a in (x, x.contiguous()))
    assert torch.equal(strided, contiguous)


@pytest.mark.parametrize("name", ["seed3", "mq3"])
def test_empty_and_zero_vectors(name):
    empty = manthanquant.encode(torch.empty(0, 128), format=name)
    assert empty.nbytes == 0 and manthanquant.decode(empty).shape == (0, 128)
    zeros = torch.zeros(3, 128)
    assert torch.equal(manthanquant.decode(manthanquant.encode(zeros, format=name)), zeros)


@pytest.mark.parametrize(
    ("x", "format", "message"),
    [
        (torch.randn(3), "seed3", r"x: expected \[N, D\]"),
        (torch.randn(3, 4).double(), "seed3", "x: dtype torch.float64 is not supported"),
        (torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]), "seed3", "x: row 1 holds NaN"),
        (torch.tensor([[float("inf"), 0.0]]), "seed3", "x: row 0 holds NaN or an infinity"),
        (torch.randn(3, 72), "mq3", "head size 72 is not supported"),
        (torch.randn(3, 64), "q8", "format 'q8' is unknown"),
    ],
)
def test_bad_input_is_refused_by_name(x, format, message):
    with pytest.raises(ValueError, match=message):
        manthanquant.encode(x, format=format)


def test_public_surface():
    assert sorted(manthanquant.__all__) == ["Encoded", "decode", "encode", "formats"]
    assert manthanquant.formats is formats
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = manthanquant.quantise
