import pytest
import torch

from manthanquant import formats, ops
from manthanquant.transform import default_transform
from manthanquant.vllm_plugin import shadow


def vectors(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(tokens, 3, 64, generator=generator).bfloat16() for _ in range(2))
    return key, value


@pytest.mark.parametrize("tokens", [1, 16, 33])
def test_pages(tokens: int) -> None:
    key, value = vectors(tokens)
    found = shadow.compress_pages(
        key, value, ops.ReferenceKernels(formats.K42V3, None), formats.K42V3, default_transform(formats.K42V3, 64), 16
    )
    assert found.errors == 0
    assert found.key.shape == found.value.shape == (min(tokens, 16), 3, 64)
    cosine = torch.nn.functional.cosine_similarity(found.value, value[:16].float(), dim=-1).mean()
    assert 0.97 < cosine < 0.999


def test_the_seeds_vectors_reach_its_cosine() -> None:
    key, value = vectors(512)
    found = shadow.compress_vectors(key, value, formats.SEED3, 512)
    cosine = torch.nn.functional.cosine_similarity(found.key, key.float(), dim=-1).mean()
    assert cosine == pytest.approx(0.983, abs=2e-3)


def test_a_vector_that_is_not_finite_is_counted_and_zero() -> None:
    key, value = vectors(4)
    key[1, 2, 5] = torch.inf
    value[3, 0, 0] = torch.nan
    for found in (
        shadow.compress_vectors(key, value, formats.SEED3, 4),
        shadow.compress_pages(
            key, value, ops.ReferenceKernels(formats.K3V3, None), formats.K3V3, default_transform(formats.K3V3, 64), 4
        ),
    ):
        assert found.errors == 2
        assert not found.key[1, 2].any() and not found.value[3, 0].any()
        assert found.key[1, 1].any()


def test_nothing_is_read_back_where_nothing_is_sampled() -> None:
    key, value = vectors(4)
    assert shadow.compress_vectors(key, value, formats.SEED3, 0).key.shape == (0, 3, 64)
    found = shadow.compress_pages(
        key, value, ops.ReferenceKernels(formats.K3V3, None), formats.K3V3, default_transform(formats.K3V3, 64), 0
    )
    assert found.key.shape == (0, 3, 64)
