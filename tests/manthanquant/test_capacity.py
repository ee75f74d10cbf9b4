import json
from pathlib import Path
from typing import Any

import pytest

from manthanquant import capacity, contract, formats
from manthanquant.settings import Settings

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "dtype": "bfloat16",
    "max_position_embeddings": 8192,
}
GEMMA = {
    "model_type": "gemma3_text",
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "dtype": "bfloat16",
}


def test_llama_shape_and_bytes() -> None:
    shape = capacity.model_shape(LLAMA)
    assert {(layer.kind, layer.kv_heads, layer.head_size) for layer in shape.layers} == {("full", 3, 64)}
    assert shape.bytes_per_token_uncompressed() == 30 * 3 * 2 * 64 * 2
    assert shape.bytes_per_token(Settings()) == 30 * 3 * 52


def test_sliding_layers_and_their_window() -> None:
    shape = capacity.model_shape(GEMMA)
    assert [layer.index for layer in shape.layers if layer.kind == "full"] == [5, 11, 17]
    assert {layer.window for layer in shape.layers if layer.kind == "sliding"} == {512}


def test_sliding_window_pattern_of_older_configurations() -> None:
    config = {**{k: v for k, v in GEMMA.items() if k != "layer_types"}, "sliding_window_pattern": 6}
    assert capacity.model_shape(config) == capacity.model_shape(GEMMA)


def test_multimodal_configuration_is_read_through_its_text_part() -> None:
    assert capacity.model_shape({"model_type": "llava", "text_config": LLAMA}) == capacity.model_shape(LLAMA)


def test_layers_that_share_a_cache_hold_none() -> None:
    shape = capacity.model_shape({**GEMMA, "num_kv_shared_layers": 8})
    assert [layer.index for layer in shape.layers] == list(range(10))


@pytest.mark.parametrize("name", [*formats.PAGED_FORMATS, *formats.ENGINE_FORMATS])
def test_ratio_is_the_formats(name: str) -> None:
    report = capacity.estimate(capacity.model_shape(LLAMA), Settings(name), 1 << 30, 4)
    expected = formats.get_paged(name).ratio(64) if name in formats.PAGED_FORMATS else 2 / formats.ENGINE_FORMATS[name]
    assert report.compression_ratio == round(expected, 3)
    assert report.capacity_tokens == (1 << 30) // int(report.bytes_per_token or 0)


def test_skipped_layers_cost_what_the_engine_pays() -> None:
    shape = capacity.model_shape(LLAMA)
    assert shape.bytes_per_token(Settings(skip_layers=(0, 29))) == 28 * 3 * 52 + 2 * 3 * 256
    held = shape.hot_pool_bytes(Settings(skip_layers=(0, 29)), 4, None)
    assert held == shape.hot_pool_bytes(Settings(), 4, None) * 28 // 30


def test_shadow_costs_what_the_engine_pays_and_has_no_exact_tier() -> None:
    report = capacity.estimate(capacity.model_shape(LLAMA), Settings(mode="shadow"), None, 4)
    assert (report.compression_ratio, report.hot_pool_bytes, report.capacity_tokens) == (1.0, 0, None)


def test_hot_pool_is_charged_to_us() -> None:
    shape = capacity.model_shape(LLAMA)
    report = capacity.estimate(shape, Settings(), 1 << 28, 16)
    pool = shape.hot_pool_bytes(Settings(), 16, None)
    assert pool == 16 * (128 // 16 + 1 + 1 + 1) * 16 * 30 * 3 * 2 * 64 * 2
    assert report.cache_bytes == (1 << 28) + pool
    assert report.capacity_tokens_uncompressed == ((1 << 28) + pool) // 23040
    assert report.saved_bytes == int(report.capacity_tokens or 0) * 23040 - (1 << 28) - pool


def test_the_hot_pool_is_bounded_where_the_caches_size_is_given() -> None:
    shape = capacity.model_shape(LLAMA)
    slot = 16 * 30 * 3 * 2 * 64 * 2
    assert shape.hot_pool_bytes(Settings(), 1000, 1 << 28) == (1 << 26) // slot * slot
    assert shape.hot_pool_bytes(Settings(), 1000, 1) == slot
    assert shape.hot_pool_bytes(Settings(recent_tokens=0, sink_tokens=0), 1000, 1 << 28) == 0


def test_what_the_default_requests_of_a_cpu_leave_of_the_gain() -> None:
    """A small model's cache of 1 GiB: 4.92 times the tokens in the pages, 4.7 with the exact tier charged to us."""
    report = capacity.estimate(capacity.model_shape(LLAMA), Settings(), 1 << 30, contract.CPU_MAX_REQUESTS)
    assert report.compression_ratio is not None and report.compression_ratio >= 4.9
    assert int(report.capacity_tokens or 0) >= 4.7 * int(report.capacity_tokens_uncompressed or 0)


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        ({"kv_lora_rank": 512}, "kv_lora_rank 512"),
        ({"model_type": "bert"}, "an encoder"),
        ({"is_encoder_decoder": True}, "an encoder"),
        ({"model_type": "bloom"}, "ALiBi"),
        ({"alibi": True}, "ALiBi"),
        ({"model_type": "gpt_oss"}, "sink logits"),
        ({"layer_types": ["linear_attention"] * 30}, "linear_attention"),
        ({"layer_types": ["chunked_attention"] * 30}, "chunked_attention"),
        ({"head_dim": 112}, "head size 112"),
    ],
)
def test_a_model_that_cannot_be_held_is_named_with_the_remedy(change: dict[str, Any], needle: str) -> None:
    with pytest.raises(capacity.UnsupportedModel, match="--mode off") as caught:
        capacity.model_shape({**LLAMA, **change})
    assert needle in str(caught.value)


def test_a_configuration_without_a_shape_names_the_missing_field() -> None:
    with pytest.raises(capacity.UnsupportedModel, match="'num_hidden_layers' is missing"):
        capacity.model_shape({"model_type": "odd", "num_attention_heads": 4})


def test_read_config(tmp_path: Path) -> None:
    with pytest.raises(capacity.UnsupportedModel, match="not there"):
        capacity.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(capacity.UnsupportedModel, match="not JSON"):
        capacity.read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert capacity.read_config(tmp_path) == LLAMA
