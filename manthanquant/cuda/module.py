"""From an extension to the loaded module of the GPU at hand, and what calls into it share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from manthanquant.jit import Extension, cuda_arch, load, obtain


@cache
def module_for(extension: Extension, device: torch.device) -> ModuleType:
    """The module of `extension` for `device`: cached, or compiled now. Raises `JitError`."""
    arch = cuda_arch(torch.cuda.get_device_capability(device))
    return load(extension.name, obtain(extension, arch))


def stream_of(device: torch.device) -> int:
    """The handle of the device's current stream."""
    return torch.cuda.current_stream(device).cuda_stream


def address(tensor: Tensor | None) -> int:
    """Where a tensor's data begins; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def traceable(name: str, launch: Callable[..., None], *, writes: tuple[str, ...]) -> Callable[..., None]:
    """`launch`, which `torch.compile` sees as the operator `manthanquant::name`: opaque, with its writes declared.

    `launch` takes tensors and plain values only and changes the arguments in `writes`. Outside a trace it is called as
    it is: an operator's dispatch costs more than most of our kernels take to launch.
    """
    operator = torch.library.custom_op(f"manthanquant::{name}", launch, mutates_args=writes, device_types="cuda")
    operator.register_fake(lambda *_: None)

    def call(*arguments: object) -> None:
        (operator if torch.compiler.is_compiling() else launch)(*arguments)

    return call


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
