"""vLLM's FlashAttention as prefill's dense attention: the one place that knows its interface."""

from __future__ import annotations

import torch
from torch import Tensor

from manthanquant.cuda.prefill import DenseAttention

HOPPER = 9  # compute capability


def flash_attention(device: torch.device) -> DenseAttention:
    """FlashAttention 3 on Hopper, 2 elsewhere. Raises `RuntimeError` where vLLM has none for the GPU."""
    try:
        from vllm.vllm_flash_attn import flash_attn_interface
    except ImportError as error:
        raise RuntimeError(
            f"prefill needs vLLM's FlashAttention, which cannot be imported ({error}): install vLLM's CUDA build"
        ) from error
    version = 3 if torch.cuda.get_device_capability(device)[0] == HOPPER else 2
    if not flash_attn_interface.is_fa_version_supported(version):
        reason = flash_attn_interface.fa_version_unsupported_reason(version)
        raise RuntimeError(f"prefill needs FlashAttention {version}: {reason}: install vLLM's CUDA build")

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        query_starts: Tensor,
        key_starts: Tensor,
        max_queries: int,
        max_keys: int,
        scale: float,
        causal: bool,
        left: int | None,
        soft_cap: float | None,
        out: Tensor,
    ) -> Tensor:
        _, lse = flash_attn_interface.flash_attn_varlen_func(
            query,
            key,
            value,
            cu_seqlens_q=query_starts,
            cu_seqlens_k=key_starts,
            max_seqlen_q=max_queries,
            max_seqlen_k=max_keys,
            softmax_scale=scale,
            causal=causal,
            window_size=None if left is None else [left, 0 if causal else -1],
            softcap=soft_cap or 0.0,
            return_softmax_lse=True,
            out=out,
            fa_version=version,
        )
        return lse

    return attend
