"""What a step's layers share: who decodes, who prefills, and the exact tier's tables.

Built once a step and cache group, so that each layer only calls kernels. Decodes come first in the batch
(`reorder_batch_threshold`), so a step is at most two calls a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from manthanquant.formats import UNIT_TOKENS
from manthanquant.hot import HotTable
from manthanquant.vllm_plugin import compat, runtime


@dataclass(frozen=True)
class Batch:
    """Some requests of the step: `query[rows]` are their new tokens. Shapes as in `reference`.

    `prefill`: the new tokens are read as they come, exact, and only those before them from the cache. A decode's is
    in the exact tier.
    """

    rows: slice
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    prefill: bool


@dataclass(frozen=True)
class StepMetadata:
    """One step of one cache group. `hot_slots` int64 `[T]` and `hot_table` int32 `[units]`: see `hot`."""

    batches: tuple[Batch, ...]
    hot_slots: Tensor | None
    hot_table: Tensor | None


class MetadataBuilder(AttentionMetadataBuilder[StepMetadata]):
    """One a cache group."""

    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        self._table: HotTable | None = None
        self._slots = min(
            (layer.impl.hot_slots for name, layer in compat.layers_of(vllm_config).items() if name in layer_names),
            default=0,
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepMetadata:
        common = common_attn_metadata
        table, slots = self._hot_table(), None
        if table is not None:
            slots = table.update(
                common.slot_mapping, common.block_table_tensor, common.seq_lens, common.query_start_loc
            )
        decodes, prefills, decoded, prefilled = split_decodes_and_prefills(common, decode_threshold=1)
        parts = ((0, decodes, 0, decoded, False), (decodes, prefills, decoded, prefilled, True))
        batches = tuple(_batch(common, *part) for part in parts if part[1])
        return StepMetadata(batches, slots, None if table is None else table.slot)

    def _hot_table(self) -> HotTable | None:
        """This group's table, made at the first step: only then does the cache's size stand in the layers."""
        if self._table is None and self._slots:
            wanted = runtime.current().settings
            cache = compat.layers_of(self.vllm_config)[self.layer_names[0]].kv_cache
            pages, _, page_tokens, _ = cache.shape
            self._table = HotTable(
                pages * page_tokens // UNIT_TOKENS,
                self._slots,
                page_tokens,
                wanted.recent_tokens,
                wanted.sink_tokens,
                cache.device,
            )
            runtime.current().tables.append(self._table)
        return self._table


def _batch(
    common: CommonAttentionMetadata, first: int, requests: int, first_token: int, tokens: int, prefill: bool
) -> Batch:
    last = first + requests
    return Batch(
        slice(first_token, first_token + tokens),
        common.block_table_tensor[first:last],
        common.seq_lens[first:last],
        common.query_start_loc[first : last + 1] - first_token,
        prefill,
    )
