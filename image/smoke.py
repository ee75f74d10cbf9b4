"""What must hold inside a built image: `python smoke.py operator`, `server-cpu` or `server-gpu`. No GPU is needed.

docker run --rm --read-only --tmpfs /work --entrypoint python -v $PWD/image/smoke.py:/smoke.py IMAGE /smoke.py TARGET
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def check(what: str, holds: object) -> None:
    if not holds:
        raise SystemExit(f"smoke: FAILED: {what}")
    print(f"smoke: {what}")


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def bytecode_is_current(module: str) -> bool:
    """Whether the module's .pyc is there and made from this very source: else each start compiles it again."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return False
    compiled = Path(importlib.util.cache_from_source(spec.origin))
    if not compiled.exists():
        return False
    with tempfile.TemporaryDirectory() as folder:
        fresh = py_compile.compile(spec.origin, cfile=f"{folder}/fresh.pyc", doraise=True)
        assert fresh is not None
        return Path(fresh).read_bytes()[:16] == compiled.read_bytes()[:16]


def common() -> None:
    check("runs as user 1000", os.getuid() == 1000)
    check("manthanquant is installed", importlib.metadata.version("manthanquant"))
    check("byte-compiled", bytecode_is_current("manthanquant.contract"))


def operator() -> None:
    common()
    check("no PyTorch", importlib.util.find_spec("torch") is None)
    check("no compiler", shutil.which("g++") is None)
    command = (sys.executable, "-m", "manthanquant_operator", "crd")
    check("prints its CustomResourceDefinition", "quantizedmodels.manthanquant.io" in output(*command))


def server(cuda_build: bool) -> None:
    common()
    import torch

    check("PyTorch computes", float(torch.ones(3) @ torch.ones(3)) == 3.0)
    check("vLLM is byte-compiled", bytecode_is_current("vllm"))
    check("a C++ compiler and Python's headers", shutil.which("g++") and output("g++", "--version"))
    plugins = {entry.name for entry in importlib.metadata.entry_points(group="vllm.general_plugins")}
    check("the plug-in is registered with vLLM", "manthanquant" in plugins)
    check("the formats are listed", "k42v3" in output("manthanquant", "formats"))
    if cuda_build:
        source = "#include <cuda_runtime.h>\n#include <cub/cub.cuh>\n__global__ void f(int* x) { *x = 1; }\n"
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "probe.cu").write_text(source)
            nvcc = f"{os.environ['CUDA_HOME']}/bin/nvcc"
            flags = ("-arch=sm_90a", "-shared", "-Xcompiler", "-fPIC", "-lcudart", f"-L{os.environ['CUDA_HOME']}/lib64")
            subprocess.run((nvcc, *flags, "-o", f"{folder}/probe.so", f"{folder}/probe.cu"), check=True)
        check("nvcc compiles and links a kernel for sm_90a", True)
    else:
        check("no GPU is seen", not torch.cuda.is_available())


if __name__ == "__main__":
    targets = {
        "operator": operator,
        "server-cpu": lambda: server(cuda_build=False),
        "server-gpu": lambda: server(cuda_build=True),
    }
    if len(sys.argv) != 2 or sys.argv[1] not in targets:
        raise SystemExit(f"usage: smoke.py {' | '.join(targets)}")
    targets[sys.argv[1]]()
