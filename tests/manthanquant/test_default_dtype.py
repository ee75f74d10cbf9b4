"""An engine that loads a model sets PyTorch's default dtype to the model's: nothing of ours may follow it."""

from collections.abc import Iterator

import pytest
import torch

from manthanquant import formats, ops, quantize, selfcheck, vectors
from manthanquant.quantize import dequantize
from manthanquant.transform import default_transform


@pytest.fixture
def half_by_default() -> Iterator[None]:
    """bfloat16 as the default, and tables that were not made before."""
    quantize._tables.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)
    quantize._tables.cache_clear()


def codes(fmt: formats.Format) -> torch.Tensor:
    x = torch.randn(200, 1, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    coded = quantize.quantize(default_transform(fmt, 64).key.apply(x), fmt, "key")
    decoded = dequantize(coded.codes, coded.scale_bytes, fmt, "key")
    assert decoded.dtype == torch.float32
    return decoded


@pytest.mark.parametrize("name", formats.PAGED_FORMATS)
def test_codes_do_not_depend_on_it(name: str, request: pytest.FixtureRequest) -> None:
    expected = codes(formats.get_paged(name))
    request.getfixturevalue("half_by_default")
    assert torch.equal(codes(formats.get_paged(name)), expected)


def test_the_selfcheck_does_not_depend_on_it(half_by_default: None) -> None:
    fmt = formats.K42V3
    assert selfcheck.check(ops.ReferenceKernels(fmt, None), fmt, 64) == 0


def test_vectors_do_not_depend_on_it(request: pytest.FixtureRequest) -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    expected = vectors.decode(vectors.encode(x, "seed3"))
    request.getfixturevalue("half_by_default")
    assert torch.equal(vectors.decode(vectors.encode(x, "seed3")), expected)
