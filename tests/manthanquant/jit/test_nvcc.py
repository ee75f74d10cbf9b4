"""CUDA builds: which architecture a GPU gets, where nvcc is looked for, and that kernels compile with no GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from manthanquant.formats import K42V3
from manthanquant.jit import Extension, JitError, cuda_arch, named, nvcc, obtain
from manthanquant.jit.kernels import cuda_extensions, vectors_extension


@pytest.fixture(autouse=True)
def fresh_search() -> object:
    nvcc.find_nvcc.cache_clear()
    yield
    nvcc.find_nvcc.cache_clear()


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100a"),
        ((12, 0), "sm_120a"),
    ],
)
def test_the_architecture_of_a_gpu(capability: tuple[int, int], name: str) -> None:
    assert cuda_arch(capability) is named(name)


@pytest.mark.parametrize("capability", [(7, 5), (10, 3), (12, 1), (13, 0)])
def test_an_unsupported_gpu_is_named(capability: tuple[int, int]) -> None:
    with pytest.raises(
        JitError, match=f"a GPU of compute capability {capability[0]}.{capability[1]} is not supported: use one"
    ):
        cuda_arch(capability)


def test_cuda_home_without_nvcc_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(JitError, match=r"CUDA_HOME=.* holds no bin/nvcc: unset it"):
        nvcc.find_nvcc()


def test_cuda_home_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert nvcc.find_nvcc() == tmp_path / "bin" / "nvcc"


def test_no_nvcc_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nvcc, "WHEEL_PACKAGE", "no_such_package")
    with pytest.raises(JitError, match=r"pip install manthanquant\[nvcc\]"):
        nvcc.find_nvcc()


@pytest.mark.compile
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    "extension", [*cuda_extensions(K42V3, 64, "bfloat16"), vectors_extension()], ids=lambda extension: extension.name
)
def test_every_kernel_compiles_without_a_gpu(extension: Extension, arch: str, tmp_path: Path) -> None:
    try:
        nvcc.find_nvcc()
    except JitError as error:
        pytest.skip(str(error))
    result = obtain(extension, named(arch), cache_dir=tmp_path)
    assert result.source == "Built" and result.arch == arch
    undefined = subprocess.run(["nm", "-uC", str(result.path)], capture_output=True, text=True, check=True).stdout
    assert "mq::" not in undefined
