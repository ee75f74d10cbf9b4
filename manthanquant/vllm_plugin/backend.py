"""The two attention backends that vLLM sees: pages of codes, and the shadow beside vLLM's own cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from manthanquant.formats import SUPPORTED_HEAD_SIZES, UNIT_TOKENS
from manthanquant.vllm_plugin import runtime


class CompressedBackend(AttentionBackend):
    """Pages hold codes; attention reads them. vLLM's allocator sees the smaller page and makes more of them."""

    forward_includes_kv_cache_update = False
    supported_dtypes = [torch.bfloat16, torch.float16, torch.float32]  # noqa: RUF012 (vLLM's own declaration)
    supported_kv_cache_dtypes = ["auto"]  # noqa: RUF012

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"  # the entry that it overrides: vLLM looks the name up there

    @staticmethod
    def get_impl_cls() -> Any:
        from manthanquant.vllm_plugin.impl import CompressedImpl

        return CompressedImpl

    @staticmethod
    def get_builder_cls() -> Any:
        from manthanquant.vllm_plugin.metadata import MetadataBuilder

        return MetadataBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The page as our format has it. vLLM asks more than once, also of specs that are ours already."""
        if spec.state_content_bytes is not None:
            return spec
        token_bytes = runtime.current().format.token_bytes(spec.head_size)
        return dataclasses.replace(spec, dtype=torch.uint8, state_content_bytes=token_bytes)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)  # a page and head is one run of units

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(UNIT_TOKENS)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(SUPPORTED_HEAD_SIZES)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True


class ShadowBackend(CPUAttentionBackend):
    """vLLM's own backend; each write is also compressed, measured and dropped."""

    @staticmethod
    def get_impl_cls() -> Any:
        from manthanquant.vllm_plugin.impl import ShadowImpl

        return ShadowImpl
