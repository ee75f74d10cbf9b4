"""From an extension to the loaded module of the GPU at hand."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch

from manthanquant.jit import Extension, cuda_arch, load, obtain


@cache
def module_for(extension: Extension, device: torch.device) -> ModuleType:
    """The module of `extension` for `device`: cached, or compiled now. Raises `JitError`."""
    arch = cuda_arch(torch.cuda.get_device_capability(device))
    return load(extension.name, obtain(extension, arch))


def stream_of(device: torch.device) -> int:
    """The handle of the device's current stream."""
    return torch.cuda.current_stream(device).cuda_stream
