"""What `manthanquant build` builds where nothing is said."""

from __future__ import annotations

import pytest
import torch

from manthanquant.jit import JitError, detect_cpu
from manthanquant.jit.command import of_this_machine


@pytest.mark.parametrize(
    ("gpus", "expected"), [([], []), ([(9, 0), (9, 0)], ["sm_90a"]), ([(9, 0), (8, 9)], ["sm_89", "sm_90a"])]
)
def test_this_machine_is_its_cpu_and_its_gpus(
    gpus: list[tuple[int, int]], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index])
    assert [arch.name for arch in of_this_machine()] == [detect_cpu().name, *expected]


def test_an_unsupported_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    with pytest.raises(JitError, match=r"compute capability 7\.5 is not supported"):
        of_this_machine()
