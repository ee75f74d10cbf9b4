"""vLLM's FlashAttention as prefill calls it: what is said where there is none, and what its window means."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from manthanquant.vllm_plugin.flash_attention import flash_attention

DEVICE = torch.device("cuda")


@pytest.fixture
def interface(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for vLLM's interface, with FlashAttention 3 only."""
    package, module = ModuleType("vllm.vllm_flash_attn"), ModuleType("vllm.vllm_flash_attn.flash_attn_interface")
    package.flash_attn_interface = module
    module.is_fa_version_supported = lambda version: version == 3
    module.fa_version_unsupported_reason = lambda version: f"no FA{version} here"
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_without_it_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", None)
    with pytest.raises(RuntimeError, match=r"cannot be imported .*: install vLLM's CUDA build"):
        flash_attention(DEVICE)


def test_a_version_that_the_gpu_cannot_run(interface: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(RuntimeError, match="FlashAttention 2: no FA2 here"):
        flash_attention(DEVICE)


@pytest.mark.parametrize(
    ("causal", "left", "window_size"), [(True, None, None), (True, 7, [7, 0]), (False, 7, [7, -1]), (False, None, None)]
)
def test_arguments(
    causal: bool,
    left: int | None,
    window_size: list[int] | None,
    interface: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = {}

    def varlen(*tensors: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        asked.update(options)
        return tensors[0], torch.ones(1)

    interface.flash_attn_varlen_func = varlen
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    starts = torch.tensor([0, 2])
    sums = flash_attention(DEVICE)(
        *torch.zeros(3, 2, 1, 64),
        query_starts=starts,
        key_starts=starts,
        max_queries=2,
        max_keys=2,
        scale=0.5,
        causal=causal,
        left=left,
        soft_cap=None,
        out=torch.zeros(2, 1, 64),
    )
    assert sums is not None and asked["fa_version"] == 3
    assert (asked["causal"], asked["window_size"], asked["softcap"]) == (causal, window_size, 0.0)
