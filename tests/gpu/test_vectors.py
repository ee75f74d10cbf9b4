"""The CUDA codec of plain vectors gives the PyTorch reference's bits."""

from __future__ import annotations

import math

import pytest
import torch

import manthanquant

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def check(x):
    on_cpu, on_gpu = manthanquant.encode(x.cpu()), manthanquant.encode(x)
    assert torch.equal(on_gpu.scales.cpu(), on_cpu.scales)
    assert torch.equal(on_gpu.codes.cpu(), on_cpu.codes)
    assert torch.equal(manthanquant.decode(on_gpu).cpu(), manthanquant.decode(on_cpu))


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [1, 5, 16, 31, 32, 64, 80, 96, 100, 128, 192, 256, 257, 576, 1000])
def test_every_size_and_dtype(head_size, dtype):
    torch.manual_seed(head_size)
    check((torch.randn(333, head_size, device="cuda") * torch.rand(333, 1, device="cuda") * 100).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_agree_on_many_vectors(dtype):
    torch.manual_seed(0)
    check(torch.randn(200_000, 128, device="cuda").to(dtype))


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_signs_and_tiny_elements(dtype):
    """Zero lies on the middle boundary, -0 too, and a tiny element is not a zero."""
    x = torch.randn(64, 128, device="cuda")
    x[:, 0], x[:, 1], x[:, 2], x[:, 3] = 0.0, -0.0, 1e-38, -1e-38
    x[7] = 0.0
    check(x.to(dtype))


def test_strides():
    x = torch.randn(40, 300, device="cuda").bfloat16()
    check(x[:, 3:131])
    check(x[::2, :128])
    check(x.T)


def test_empty():
    encoded = manthanquant.encode(torch.empty(0, 128, device="cuda"))
    assert encoded.nbytes == 0 and manthanquant.decode(encoded).shape == (0, 128)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_rows_are_named(bad):
    x = torch.randn(5, 128, device="cuda")
    x[3, 100] = bad
    with pytest.raises(ValueError, match="x: row 3 holds NaN or an infinity"):
        manthanquant.encode(x)
