from __future__ import annotations

import pytest
import torch
from support.random_models import save_model

pytest.importorskip("transformers")
from manthanquant.hf import AttentionCall, Model, ModelError, attend, exact_attention, rotary_candidates

GEMMA = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 24,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
    },
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("gemma"), "gemma3_text", **GEMMA)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_model_computes_what_transformers_computes(family, request):
    from transformers import AutoModelForCausalLM

    path = request.getfixturevalue(family)
    tokens = torch.randint(0, 256, (300,), generator=torch.Generator().manual_seed(1))
    own = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        expected = own(tokens[None]).logits[0].log_softmax(-1)
    model = Model(path)
    model.check_head()
    assert (model.log_probabilities(model.hidden(tokens)) - expected).abs().max() < 1e-4


def test_two_models_keep_their_own_attention(llama, gemma):
    first, second = Model(llama), Model(gemma)
    tokens = torch.arange(20)
    before = first.hidden(tokens)
    with second.replaced(lambda call: torch.zeros_like(call.query)):
        assert torch.equal(first.hidden(tokens), before)


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_attention_in_blocks_equals_one_softmax(window, soft_cap):
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(n, 37, 64, generator=generator) for n in (6, 2, 2))
    call = AttentionCall(0, query, key, value, 0.2, window, soft_cap, None)
    scores = torch.einsum("hnd,hmd->hnm", query, key.repeat_interleave(3, 0)) * 0.2
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    distance = torch.arange(37)[:, None] - torch.arange(37)
    scores[:, (distance < 0) | (distance >= (window or 99))] = -torch.inf
    expected = scores.softmax(-1) @ value.repeat_interleave(3, 0)
    in_blocks = torch.cat([output for _, _, output in attend(call, block=8)], 1)
    assert torch.allclose(in_blocks, expected, atol=1e-5)
    assert torch.allclose(exact_attention(call), expected, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1])
def test_averages_over_positions_are_the_sum_over_positions(which):
    """Partial rotary: 6 of 10 channels turn; both pairings."""
    rotary = rotary_candidates(torch.tensor([1.0, 0.1, 0.003]), 10)[which]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 10, generator=generator, dtype=torch.float64)
    root = torch.randn(2, 10, 4, generator=generator, dtype=torch.float64)
    moment, span = root @ root.transpose(1, 2), 700
    turned = [rotary.turn(x[:, None], torch.tensor([t]))[:, 0] for t in range(span)]
    assert torch.allclose(rotary.average_vector(x, span), torch.stack(turned).mean(0), atol=1e-9)
    columns = [rotary.turn(root.transpose(1, 2), torch.tensor([t] * 4)) for t in range(span)]
    summed = sum(c.transpose(1, 2) @ c for c in columns) / span
    assert torch.allclose(rotary.average_moment(moment, span), summed, atol=1e-9)


def test_turning_back_undoes_turning():
    rotary = rotary_candidates(torch.tensor([1.0, 0.2]), 4)[1]
    x, positions = torch.randn(3, 5, 4), torch.arange(5)
    assert torch.allclose(rotary.turn(rotary.turn(x, positions), -positions), x, atol=1e-6)


def test_each_layer_shows_its_own_frequencies(gemma):
    found = Model(gemma).rotaries(2048)
    index = torch.arange(0, 64, 2) / 64
    assert torch.allclose(found[0].frequency, (1e4**-index).double(), rtol=1e-5)
    assert torch.allclose(found[1].frequency, (1e6**-index / 4).double(), rtol=1e-5)


def test_a_partial_embedding_of_neighbouring_channels_is_found(tmp_path):
    settings = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    found = Model(save_model(tmp_path, "glm", **settings)).rotaries(2048)[0]
    assert found.frequency.count_nonzero() == 16
    assert (found.first[1], found.second[1]) == (2, 3)


def test_keys_that_no_frequency_explains_are_refused(llama, monkeypatch):
    model = Model(llama)
    rotary = model.module.model.rotary_emb
    own = rotary.forward
    monkeypatch.setattr(rotary, "forward", lambda x, position_ids: own(x, position_ids * 3))
    with pytest.raises(ModelError, match=r"layer 0: none of the model's rotary frequencies .* calibration off"):
        model.rotaries(2048)


def test_a_missing_model_is_one_line(tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded"):
        Model(tmp_path / "absent")


def test_learned_sinks_are_refused(llama):
    model = Model(llama)
    attention = model.module.model.layers[0].self_attn
    from manthanquant.hf import _dispatch

    x = torch.zeros(1, 4, 3, 64)
    with pytest.raises(ModelError, match="not plain causal attention"):
        _dispatch(attention, x, x[:, :2], x[:, :2], None, s_aux=torch.zeros(4))
