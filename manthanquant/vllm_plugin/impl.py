"""One layer's attention: store what the step brings, attend to what the cache holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from manthanquant import capacity, formats, settings
from manthanquant.formats import check_head_size
from manthanquant.reference import HotPool
from manthanquant.stats import SAMPLE_EVERY, SAMPLE_TOKENS, SHADOW_SAMPLE_EVERY
from manthanquant.vllm_plugin import compat, runtime, sampling, shadow
from manthanquant.vllm_plugin.metadata import StepMetadata


class CompressedImpl(AttentionImpl[StepMetadata]):
    """Attention over pages of codes. `hot_slots` is the size of this layer's exact tier, in units of 16 tokens."""

    hot_slots = 0

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **more: Any,
    ) -> None:
        check_head_size(head_size)
        _refuse(alibi_slopes is not None, "ALiBi position biases")
        _refuse(attn_type != AttentionType.DECODER, f"attention of type {attn_type}")
        _refuse(kv_cache_dtype != "auto", f"--kv-cache-dtype {kv_cache_dtype}; leave it out: --kv-format chooses")
        for name, value in more.items():
            _refuse(value is not None, f"the attention argument {name!r}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype, self.attn_type = num_kv_heads, kv_cache_dtype, attn_type
        self.sliding_window = sliding_window
        self.soft_cap = logits_soft_cap or None
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        state = runtime.current()
        self.format = state.format
        self.token_bytes = self.format.token_bytes(head_size)
        self.sink_tokens, self.recent_tokens = state.settings.sink_tokens, state.settings.recent_tokens
        self._writes = 0

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """After the weights, before the engine measures memory: this layer's transform and exact tier."""
        state = runtime.current()
        name, layer = compat.layer_of(self)
        index = compat.layer_index(name)
        element_bytes = layer.kv_cache_torch_dtype.itemsize
        if index in state.settings.skip_layers:
            state.count_layer(self.num_kv_heads, self.head_size, element_bytes, None)
            layer.attn_backend = CPUAttentionBackend
            layer.impl = compat.engine_impl(CPUAttentionBackendImpl, self)
            layer.impl.process_weights_after_loading(act_dtype)
            return
        self.kernels = state.kernels(self.head_size)
        self.transform = state.transform(index, self.head_size, self.num_kv_heads)
        if self.kv_sharing_target_layer_name is not None:  # reads another layer's pages, in that layer's transform
            target = compat.layers_of(get_current_vllm_config())[self.kv_sharing_target_layer_name]
            self.transform = target.impl.transform
            self.hot_copies = target.impl.hot_copies
            self.hot_slots = target.impl.hot_slots
            return
        state.count_layer(self.num_kv_heads, self.head_size, element_bytes, self.token_bytes)
        self.hot_slots = _hot_slots(state.settings)
        self.hot_copies = runtime.hot_copies(self.hot_slots, self.num_kv_heads, self.head_size)
        state.pool_bytes += sum(copy.nbytes for copy in self.hot_copies)

    def _hot(self, metadata: StepMetadata) -> HotPool | None:
        if metadata.hot_table is None:
            return None
        key, value = self.hot_copies
        return HotPool(key, value, metadata.hot_table)

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Codes the step's keys and values `[T, KV heads, D]` into the pages, before `forward`."""
        metadata: StepMetadata = compat.metadata_of(layer.layer_name)
        state = runtime.current()
        errors = self.kernels.store(
            key, value, kv_cache, slot_mapping, self.transform, self._hot(metadata), metadata.hot_slots
        )
        tokens = slot_mapping.shape[0]
        state.writes.add_write(
            tokens,
            self.num_kv_heads,
            2 * self.head_size * key.element_size(),
            self.token_bytes,
            errors,
        )
        if self._writes == 0 or state.writes.calls % SAMPLE_EVERY == 0:
            chosen = (slot_mapping[:SAMPLE_TOKENS] >= 0).nonzero()[:, 0]
            stored = sampling.read_tokens(kv_cache, slot_mapping[chosen], self.format, self.transform, self.head_size)
            state.writes.add_sample(key[chosen], stored[0], value[chosen], stored[1])
        self._writes += 1

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: StepMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of the step's tokens, written into `output` `[T, heads, D]`."""
        if attn_metadata is None:  # compilation's warm-up, without a cache
            return output
        hot = self._hot(attn_metadata)
        for batch in attn_metadata.batches:
            self.kernels.attention(
                query[batch.rows],
                kv_cache,
                batch.block_table,
                batch.seq_lens,
                batch.query_start_loc,
                self.transform,
                self.scale,
                window=self.sliding_window,
                soft_cap=self.soft_cap,
                sink_tokens=self.sink_tokens,
                recent_tokens=self.recent_tokens,
                hot=hot,
                chunk=(key[batch.rows], value[batch.rows]) if batch.prefill else None,
                out=output[batch.rows],
            )
        return output


class ShadowImpl(CPUAttentionBackendImpl):
    """vLLM's own attention and cache; each write is also compressed, measured now and then, and dropped."""

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        state = runtime.current()
        name, layer = compat.layer_of(self)
        self._skip = compat.layer_index(name) in state.settings.skip_layers
        self._writes = 0
        self._format = formats.get(state.settings.format)
        if isinstance(self._format, formats.Format):
            self._kernels = state.kernels(self.head_size)
            self._transform = state.transform(compat.layer_index(name), self.head_size, self.num_kv_heads)
        if self.kv_sharing_target_layer_name is None:  # the engine's own cache serves: that is what a token costs
            state.count_layer(self.num_kv_heads, self.head_size, layer.kv_cache_torch_dtype.itemsize, None)

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        state = runtime.current()
        if self._skip:
            return
        tokens = slot_mapping.shape[0]
        key, value = key[:tokens], value[:tokens]
        sampled = SAMPLE_TOKENS if self._writes % SHADOW_SAMPLE_EVERY == 0 else 0
        if isinstance(self._format, formats.Format):
            result = shadow.compress_pages(key, value, self._kernels, self._format, self._transform, sampled)
        else:
            result = shadow.compress_vectors(key, value, self._format, sampled)
        state.writes.add_write(
            tokens,
            self.num_kv_heads,
            2 * self.head_size * key.element_size(),
            self._format.token_bytes(self.head_size),
            result.errors,
        )
        if sampled:
            state.writes.add_sample(key[:sampled], result.key, value[:sampled], result.value)
        self._writes += 1


def _hot_slots(wanted: settings.Settings) -> int:
    """Slots of the exact tier for the requests that may run at once; every layer has its share of each.

    The same for every layer: it must not depend on which of them have been set up already.
    """
    config = get_current_vllm_config()
    per_slot = sum(
        capacity.slot_bytes(layer.impl.num_kv_heads, layer.impl.head_size)
        for name, layer in compat.layers_of(config).items()
        if isinstance(layer.impl, CompressedImpl)
        and layer.impl.kv_sharing_target_layer_name is None
        and compat.layer_index(name) not in wanted.skip_layers
    )
    return capacity.hot_slots(wanted, compat.max_requests(config), per_slot, compat.explicit_cache_bytes(config))


def _refuse(found: bool, what: str) -> None:
    if found:
        raise ValueError(f"the compressed cache does not support {what}: serve with --mode off")
