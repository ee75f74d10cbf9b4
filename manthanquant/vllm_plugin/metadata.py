"""What a step's layers share: who decodes, who prefills, where the cache lies, and the exact tier's tables.

Built once a step and cache group. Decodes come first in the batch (`reorder_batch_threshold`), so each forward is one
call for them and a loop over the few prefills.
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
class Prefill:
    """One request that brings more than one new token: `query[first:last]`, of `length` tokens in all."""

    row: int
    first: int
    last: int
    length: int


@dataclass(frozen=True)
class StepMetadata:
    """Shapes as `reference.attention` has them; the first `decodes` rows bring one token each."""

    num_actual_tokens: int
    decodes: int
    prefills: tuple[Prefill, ...]
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    hot_slots: Tensor | None  # int64 [T]; None without an exact tier
    hot_table: Tensor | None  # int32 [units]


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
        decodes, _, _, _ = split_decodes_and_prefills(common, decode_threshold=1)
        starts, lengths = common.query_start_loc_cpu.tolist(), common.seq_lens.tolist()
        prefills = tuple(
            Prefill(row, starts[row], starts[row + 1], lengths[row])
            for row in range(decodes, common.num_reqs)
            if starts[row + 1] > starts[row]
        )
        table, slots = self._hot_table(), None
        if table is not None:
            slots = table.update(
                common.slot_mapping, common.block_table_tensor, common.seq_lens, common.query_start_loc
            )
        return StepMetadata(
            common.num_actual_tokens,
            decodes,
            prefills,
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            slots,
            None if table is None else table.slot,
        )

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
