"""What a model's cache costs: `config.json` to layers, bytes a token, tokens that fit. Standard library only.

The engine allocates pages; this module only predicts them, before any weight is read, for `plan` and `prepare`. It is
also where a model that the cache cannot hold is refused, by the same file, in one line.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from manthanquant import contract, formats
from manthanquant.settings import Settings

HOT_ELEMENT_BYTES = 2  # the exact tier is bf16


class UnsupportedModel(ValueError):
    """A model whose cache has no compressed form here; the text names what was found and the remedy."""


@dataclass(frozen=True)
class LayerShape:
    """One attention layer that owns a cache."""

    index: int
    kind: Literal["full", "sliding"]
    kv_heads: int
    head_size: int
    window: int | None = None  # tokens, sliding layers only


@dataclass(frozen=True)
class ModelShape:
    """The attention layers of a model, in order, and what of its configuration bears on its cache."""

    model_type: str
    layers: tuple[LayerShape, ...]
    element_bytes: int  # of the engine's own cache
    max_positions: int | None

    def bytes_per_token(self, settings: Settings) -> int:
        """Bytes of one token, all layers and KV heads, both sides; sliding layers counted as if they kept it."""
        return sum(layer_token_bytes(layer, settings, self.element_bytes) for layer in self.layers)

    def bytes_per_token_uncompressed(self) -> int:
        return sum(2 * layer.kv_heads * layer.head_size * self.element_bytes for layer in self.layers)

    def hot_pool_bytes(self, settings: Settings, max_requests: int, page_bytes: int | None) -> int:
        """Bytes of the exact tier when `max_requests` requests may run at once beside `page_bytes` of pages."""
        held = (layer for layer in self.layers if layer.index not in settings.skip_layers)
        per_slot = sum(slot_bytes(layer.kv_heads, layer.head_size) for layer in held)
        return hot_slots(settings, max_requests, per_slot, page_bytes) * per_slot


def slot_bytes(kv_heads: int, head_size: int) -> int:
    """Bytes of one layer's share of a slot: 16 exact keys and values."""
    return formats.UNIT_TOKENS * kv_heads * 2 * head_size * HOT_ELEMENT_BYTES


def slots_needed(max_requests: int, recent_tokens: int, sink_tokens: int) -> int:
    """16-token slots of the exact tier so that `max_requests` requests never evict one another's units.

    A window that does not start on a unit spans one more, and the unit being opened is one more again.
    """
    if recent_tokens <= 0 and sink_tokens <= 0:
        return 0
    window = -(-recent_tokens // formats.UNIT_TOKENS) + 1 if recent_tokens > 0 else 0
    return max_requests * (window + 1 + -(-sink_tokens // formats.UNIT_TOKENS))


def hot_slots(settings: Settings, max_requests: int, per_slot: int, page_bytes: int | None) -> int:
    """`slots_needed` by these settings, of `per_slot` bytes in all layers; 0 where nothing is compressed.

    Where the size of the pages is given, the slots take at most a quarter of it on top: with fewer of them the least
    recently read units are read from their codes, and counted (`evictionsInWindow`).
    """
    if settings.native or settings.mode != "compressed":
        return 0
    slots = slots_needed(max_requests, settings.recent_tokens, settings.sink_tokens)
    if not slots or not per_slot or page_bytes is None:
        return slots
    return max(1, min(slots, page_bytes // 4 // per_slot))


def layer_token_bytes(layer: LayerShape, settings: Settings, element_bytes: int) -> int:
    """Bytes of one token of one layer, in the cache that these settings serve from."""
    exact = 2 * layer.kv_heads * layer.head_size * element_bytes
    if settings.mode != "compressed" or layer.index in settings.skip_layers:
        return exact
    if settings.format in formats.ENGINE_FORMATS:
        return 2 * layer.kv_heads * layer.head_size * formats.ENGINE_FORMATS[settings.format]
    return formats.get_paged(settings.format).token_bytes(layer.head_size) * layer.kv_heads


_ENCODERS = ("bert", "roberta", "distilbert", "xlm-roberta", "modernbert", "nomic_bert", "clip", "siglip", "vit")
_ALIBI = ("bloom", "mpt", "baichuan", "jais")
_LINEAR_LAYERS = ("linear_attention", "mamba", "conv", "recurrent")


def read_config(model_dir: str | Path) -> dict[str, Any]:
    """The model's `config.json`. Raises `UnsupportedModel` when it is not there or is not JSON."""
    path = Path(model_dir) / "config.json"
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UnsupportedModel(f"{path}: not there: give a directory in Hugging Face's layout") from None
    except ValueError as error:
        raise UnsupportedModel(f"{path}: not JSON ({error})") from error


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape of a Hugging Face configuration. Raises `UnsupportedModel`, naming field, value and remedy.

    A multimodal configuration is read through its `text_config`.
    """
    text: Mapping[str, Any] = config.get("text_config") or config
    model_type = str(text.get("model_type") or config.get("model_type") or "unknown")
    _refuse_unsupported(text, model_type)
    try:
        count, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
        kv_heads = int(text.get("num_key_value_heads") or heads)
        head_size = int(text.get("head_dim") or int(text["hidden_size"]) // heads)
    except KeyError as error:
        raise UnsupportedModel(
            f"config.json: field {error.args[0]!r} is missing, so the cache's shape is unknown: serve with --mode off"
        ) from None
    window = text.get("sliding_window")
    layers = []
    for index, kind in enumerate(_layer_kinds(text, count)[: count - int(text.get("num_kv_shared_layers") or 0)]):
        is_global = kind == "full"
        layers.append(
            LayerShape(
                index,
                "full" if is_global else "sliding",
                int((is_global and text.get("num_global_key_value_heads")) or kv_heads),
                int((is_global and text.get("global_head_dim")) or head_size),
                None if is_global else int(window or 0),
            )
        )
    for layer in layers:
        if layer.head_size not in formats.SUPPORTED_HEAD_SIZES:
            raise UnsupportedModel(
                f"config.json: head size {layer.head_size} (layer {layer.index}) has no format: "
                f"supported are {', '.join(map(str, formats.SUPPORTED_HEAD_SIZES))}; serve with --mode off"
            )
    dtype = str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or "bfloat16")
    return ModelShape(model_type, tuple(layers), 4 if dtype == "float32" else 2, text.get("max_position_embeddings"))


def _refuse_unsupported(text: Mapping[str, Any], model_type: str) -> None:
    found = None
    if text.get("kv_lora_rank"):
        found = f"kv_lora_rank {text['kv_lora_rank']}: multi-head latent attention (MLA)"
    elif text.get("is_encoder_decoder") or model_type in _ENCODERS:
        found = f"model_type {model_type!r}: an encoder, which keeps no growing cache"
    elif text.get("alibi") or model_type in _ALIBI or text.get("position_embedding_type") == "alibi":
        found = f"model_type {model_type!r}: ALiBi position biases"
    elif model_type == "gpt_oss":
        found = f"model_type {model_type!r}: learned sink logits"
    elif kinds := sorted({k for k in text.get("layer_types") or () if k in _LINEAR_LAYERS or "chunked" in k}):
        found = f"layer_types {', '.join(kinds)}"
    if found:
        raise UnsupportedModel(f"config.json: {found} is not supported by the compressed cache: serve with --mode off")


def _layer_kinds(text: Mapping[str, Any], count: int) -> list[str]:
    """`full` or `sliding` for each layer."""
    if text.get("layer_types"):
        return ["sliding" if "sliding" in kind else "full" for kind in text["layer_types"]]
    window, pattern = text.get("sliding_window"), text.get("sliding_window_pattern")
    if not window or text.get("use_sliding_window") is False:
        return ["full"] * count
    if isinstance(pattern, int) and pattern > 0:
        return ["full" if (index + 1) % pattern == 0 else "sliding" for index in range(count)]
    return ["sliding"] * count


def estimate(shape: ModelShape, settings: Settings, page_bytes: int | None, max_requests: int) -> contract.CacheReport:
    """What `page_bytes` bytes of pages hold. `capacity_tokens` counts full-length layers at every token; a model with
    sliding layers holds more, which only the engine's allocator knows. `cache_bytes` adds the hot pool."""
    ours, engine = shape.bytes_per_token(settings), shape.bytes_per_token_uncompressed()
    elements = engine // shape.element_bytes
    hot = shape.hot_pool_bytes(settings, max_requests, page_bytes)
    report = contract.CacheReport(
        format=settings.format,
        mode=settings.mode,
        bits_per_element=round(ours * 8 / elements, 3),
        bytes_per_token=ours,
        bytes_per_token_uncompressed=engine,
        compression_ratio=round(engine / ours, 3),
        hot_pool_bytes=hot,
    )
    return report if page_bytes is None else with_pages(report, page_bytes, page_bytes // ours)


def with_pages(report: contract.CacheReport, page_bytes: int, tokens: int) -> contract.CacheReport:
    """`report` completed by what the pages take and how many tokens they hold.

    The uncompressed figure is what the engine's own dtype would hold in the same bytes, hot pool included: the exact
    tier is a cost of ours and is charged to us.
    """
    total = page_bytes + (report.hot_pool_bytes or 0)
    engine = report.bytes_per_token_uncompressed
    return dataclasses.replace(
        report,
        cache_bytes=total,
        capacity_tokens=tokens,
        capacity_tokens_uncompressed=total // engine if engine else None,
        saved_bytes=tokens * engine - total if engine else None,
    )
