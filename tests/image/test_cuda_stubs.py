"""The stand-ins for CUDA: what is read from the linker's reports, and real libraries made from it."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest


def _load() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "image" / "cuda_stubs.py"
    spec = importlib.util.spec_from_file_location("cuda_stubs", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stubs = _load()

LDD = """\
\tlibc.so.6 => /lib/libc.so.6 (0x00007f)
\tlibcudart.so.13 => not found
\tlibcudnn.so.9 => not found
\tlibcudart.so.13 => not found
undefined symbol: cudaFree, version libcudart.so.13\t(./liba.so)
undefined symbol: cuLaunch\t(./liba.so)
undefined symbol: PyLong_Type\t(./liba.so)
"""


def test_ldd_report() -> None:
    missing, symbols = stubs.parse_ldd(LDD)
    assert missing == ["libcudart.so.13", "libcudnn.so.9"]
    assert symbols == {"cudaFree", "cuLaunch", "PyLong_Type"}


def test_nm_report() -> None:
    text = "                 U cudaFree@libcudart.so.13\n                 w plain\n0000 T ours@@V1\n"
    assert stubs.parse_nm(text) == {"cudaFree": "libcudart.so.13", "plain": None, "ours": "V1"}


def test_version_needs() -> None:
    text = "Version: 1  File: liba.so.1  Cnt: 2\n Name: A_1 \n Name: A_2 \n"
    text += " Version: 1  File: libb.so.2  Cnt: 1\n Name: B "
    assert stubs.parse_version_needs(text) == {"A_1": "liba.so.1", "A_2": "liba.so.1", "B": "libb.so.2"}


def test_symbols_go_to_the_library_that_owns_their_version() -> None:
    symbols = {"one": "A_1", "other": "B", "free": None, "own": None, "PyLong_Type": None}
    found = stubs.assign(["liba.so.1", "libb.so.2"], symbols, {"A_1": "liba.so.1", "B": "libb.so.2"}, {"own"})
    assert found == {"liba.so.1": {"one": "A_1", "free": None}, "libb.so.2": {"other": "B"}}


def test_a_library_loads_with_its_stubs(tmp_path: Path) -> None:
    """A library linked with one that is then removed loads again, and its call returns the error code."""
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")

    def compile_(text: str, output: str, *flags: str) -> None:
        (tmp_path / "x.c").write_text(text)
        command = ["gcc", "-shared", "-fPIC", "-o", output, "x.c", *flags]
        subprocess.run(command, cwd=tmp_path, check=True)

    (tmp_path / "x.map").write_text("FAKE_1 { global: fake_call; };")
    versioned = ["-Wl,-soname,libfake.so.1", "-Wl,--version-script=x.map"]
    compile_("int fake_call(void) { return 1; }", "libfake.so.1", *versioned)
    user = '#include <stdlib.h>\nint fake_call(void); int call(void) { return getenv("?") ? 0 : fake_call(); }'
    compile_(user, "libuser.so", "./libfake.so.1", "-Wl,-rpath,$ORIGIN")
    (tmp_path / "libfake.so.1").unlink()
    with pytest.raises(OSError, match=r"libfake\.so\.1"):
        ctypes.CDLL(str(tmp_path / "libuser.so"))
    assert [path.name for path in stubs.build(tmp_path)] == ["libfake.so.1"]
    assert ctypes.CDLL(str(tmp_path / "libuser.so")).call() == stubs.CUDA_ERROR_NO_DEVICE


def test_a_folder_without_libraries_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="torch/lib"):
        stubs.build(tmp_path)
