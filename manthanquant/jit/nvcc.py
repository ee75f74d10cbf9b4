"""How to compile CUDA: nvcc, wherever it is, for one GPU architecture at a time. Needs no GPU and no PyTorch."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from manthanquant.jit.arch import Arch
from manthanquant.jit.errors import JitError
from manthanquant.jit.spec import Extension
from manthanquant.jit.toolchain import CppToolchain, compile_objects, run

WHEEL_PACKAGE = "nvidia.cu13"  # where the wheels nvidia-cuda-nvcc, -crt, -cccl, -runtime and nvidia-nvvm unpack
_CUDA_SOURCE = ".cu"


@dataclass(frozen=True)
class CudaToolchain:
    """nvcc for `.cu` sources; the C++ compiler for the rest and for the link. The CUDA runtime is linked statically."""

    cpp: CppToolchain = field(default_factory=CppToolchain)

    def flags(self, arch: Arch) -> tuple[str, ...]:
        return ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden", *arch.flags)

    def identity(self) -> str:
        return f"{_version(find_nvcc())}; {self.cpp.identity()}"

    def compile(self, extension: Extension, arch: Arch, work: Path, output: Path) -> None:
        nvcc = find_nvcc()
        includes = [work, *dict.fromkeys(path.parent for path in (*extension.sources, *extension.headers))]
        cuda = [str(nvcc), *self.flags(arch), *extension.flags, *(f"-I{path}" for path in includes)]
        host = self.cpp.command(Arch(arch.name), [*includes, nvcc.parent.parent / "include"], extension.flags)
        objects = [work / f"{source.stem}{source.suffix}.o" for source in extension.sources]
        compile_objects(
            [
                [*(cuda if source.suffix == _CUDA_SOURCE else host), "-c", str(source), "-o", str(o)]
                for source, o in zip(extension.sources, objects)
            ]
        )
        runtime = ("-lcudart_static", "-lpthread", "-ldl", "-lrt")
        run([*self.cpp.linker(), *map(str, objects), f"-L{_libraries(nvcc)}", *runtime, "-o", str(output)])


@cache
def find_nvcc() -> Path:
    """nvcc of `$CUDA_HOME`, of `$PATH`, or of the PyPI wheels. Raises `JitError` where there is none."""
    home = os.environ.get("CUDA_HOME")
    if home:
        nvcc = Path(home, "bin", "nvcc")
        if not nvcc.exists():
            raise JitError(f"CUDA_HOME={home} holds no bin/nvcc: unset it, or point it to a CUDA toolkit")
        return nvcc
    on_path = shutil.which("nvcc")
    if on_path:
        return Path(on_path).resolve()
    for directory in _wheel_directories():
        nvcc = directory / "bin" / "nvcc"
        if nvcc.exists():
            return nvcc
    raise JitError(
        "no nvcc (CUDA_HOME, PATH and the PyPI wheels): pip install manthanquant[nvcc], or install a CUDA toolkit"
    )


def _wheel_directories() -> list[Path]:
    try:
        spec = importlib.util.find_spec(WHEEL_PACKAGE)
    except ModuleNotFoundError:
        return []
    return [] if spec is None else [Path(path) for path in spec.submodule_search_locations or ()]


def _libraries(nvcc: Path) -> Path:
    """The directory of the static CUDA runtime. Raises `JitError` where it is missing."""
    root = nvcc.parent.parent
    for directory in (root / "lib64", root / "lib", root / "targets" / "x86_64-linux" / "lib"):
        if (directory / "libcudart_static.a").exists():
            return directory
    raise JitError(f"no libcudart_static.a beside {nvcc}: pip install nvidia-cuda-runtime, or install a CUDA toolkit")


@cache
def _version(nvcc: Path) -> str:
    done = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if "release" in line]
    if done.returncode or not lines:
        raise JitError(f"{nvcc} --version failed with exit status {done.returncode}: reinstall the CUDA toolkit")
    return lines[0].strip()
