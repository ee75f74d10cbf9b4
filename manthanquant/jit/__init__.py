"""Builds, caches and loads the compiled kernels on the machine that runs them.

An `Extension` says what to compile (`spec`), an `Arch` for what (`arch`), a `Toolchain` how (`toolchain`, `nvcc`). A
`Key` names the result (`key`) and the `KernelCache` keeps it (`cache`). `obtain` does it all: prebuilt, cached, or
built once.
"""

from manthanquant.jit.arch import Arch, cuda_arch, detect_cpu, named
from manthanquant.jit.build import BuildResult, load, obtain
from manthanquant.jit.errors import JitError
from manthanquant.jit.spec import Extension

__all__ = ["Arch", "BuildResult", "Extension", "JitError", "cuda_arch", "detect_cpu", "load", "named", "obtain"]
