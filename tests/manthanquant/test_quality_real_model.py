"""The promise of the default format on a real model: SmolLM2-135M-Instruct, and a text that calibration never saw."""

from __future__ import annotations

import pytest
from e2e import model as small_model
from localcluster import paths

pytest.importorskip("transformers")
from manthanquant import calibrate, gguf, quality
from manthanquant.contract import DEFAULT_RECENT_TOKENS, DEFAULT_SINK_TOKENS
from manthanquant.formats import DEFAULT_FORMAT
from manthanquant.hf import Model
from manthanquant.simulate import fp8_cache, turboquant_caches

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module", params=quality.DEFAULT_TOKENS)
def scores(request):
    """The default format, fp8 and vLLM's 3-bit preset, on a short and on a long text."""
    path = gguf.convert(small_model.gguf(), paths.cache_dir() / "models" / small_model.NAME)
    model = Model(path)
    text, tiers = calibrate.built_in_text(), (DEFAULT_SINK_TOKENS, DEFAULT_RECENT_TOKENS)
    caches = quality.our_caches(model, [DEFAULT_FORMAT], text, quality.DEFAULT_MAX_POSITIONS, *tiers)
    caches += [fp8_cache(), *(c for c in turboquant_caches(model.layers) if c.name == "turboquant_3bit_nc")]
    tokens = model.tokens(quality.standard_library_text())[: request.param]
    return quality.score(model, tokens, caches, quality.DEFAULT_SCORED)[1]


def test_the_default_format_costs_less_than_fp8_at_less_than_half_its_bytes(scores):
    ours, fp8, _ = scores
    assert ours.kld < fp8.kld
    assert ours.pair_bytes < fp8.pair_bytes / 2


def test_the_default_format_costs_a_twentieth_of_vllms_three_bits_at_most(scores):
    ours, _, turboquant = scores
    assert ours.kld <= turboquant.kld / 20
