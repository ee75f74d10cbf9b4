"""The promise of the default format on real models, on a text that calibration never saw."""

from __future__ import annotations

import pytest
from support.models import small_model, windowed_model

pytest.importorskip("transformers")
from manthanquant import calibrate, quality
from manthanquant.contract import DEFAULT_RECENT_TOKENS, DEFAULT_SINK_TOKENS
from manthanquant.formats import DEFAULT_FORMAT
from manthanquant.hf import Model
from manthanquant.simulate import fp8_cache, turboquant_caches

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module", params=[small_model, windowed_model], ids=["smollm2", "gemma3"])
def model(request):
    return Model(request.param())


@pytest.fixture(scope="module")
def caches(model):
    """The default format as it ships, fp8, and vLLM's 3-bit preset."""
    text, tiers = calibrate.built_in_text(), (DEFAULT_SINK_TOKENS, DEFAULT_RECENT_TOKENS)
    (ours,) = quality.our_caches(model, [DEFAULT_FORMAT], text, quality.DEFAULT_MAX_POSITIONS, *tiers)
    (turboquant,) = (cache for cache in turboquant_caches(model.layers) if cache.name == "turboquant_3bit_nc")
    return ours, fp8_cache(), turboquant


@pytest.mark.parametrize("length", quality.DEFAULT_TOKENS)
def test_the_default_costs_less_than_fp8_and_a_twentieth_of_vllms_three_bits(model, caches, length):
    tokens = model.tokens(quality.standard_library_text())[:length]
    _, (ours, fp8, turboquant) = quality.score(model, tokens, caches, quality.DEFAULT_SCORED)
    assert ours.pair_bytes < fp8.pair_bytes / 2
    assert ours.kld < fp8.kld
    assert ours.kld <= turboquant.kld / 20
