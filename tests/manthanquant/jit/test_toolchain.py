"""The real compiler on the smallest module."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manthanquant.jit import Extension, JitError, detect_cpu, load, obtain, toolchain

SOURCE = """
#include <pybind11/pybind11.h>
#include "answer.h"
PYBIND11_MODULE(tiny, m) { m.def("answer", [] { return kAnswer; }); }
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Extension:
    (tmp_path / "tiny.cpp").write_text(SOURCE)
    return Extension("tiny", (tmp_path / "tiny.cpp",), generated=(("answer.h", "constexpr int kAnswer = 42;"),))


@pytest.fixture(autouse=True)
def fresh_compiler_search() -> object:
    toolchain._compiler.cache_clear()
    yield
    toolchain._compiler.cache_clear()


def test_builds_and_loads(tiny: Extension, tmp_path: Path) -> None:
    result = obtain(tiny, detect_cpu(), cache_dir=tmp_path / "cache")
    assert load("tiny", result).answer() == 42
    started = time.perf_counter()
    again = obtain(tiny, detect_cpu(), cache_dir=tmp_path / "cache")
    load("tiny", again)
    print(f"warm load: {time.perf_counter() - started:.3f} s")
    assert again.source == "Cached"


def test_two_builds_of_one_name_in_a_process(tiny: Extension, tmp_path: Path) -> None:
    """As where a process sees GPUs of two architectures."""
    other = dataclasses.replace(tiny, generated=(("answer.h", "constexpr int kAnswer = 43;"),))
    first, second = (load("tiny", obtain(x, detect_cpu(), cache_dir=tmp_path / "cache")) for x in (tiny, other))
    assert (first.answer(), second.answer()) == (42, 43)


def test_a_compile_error_is_one_line(tiny: Extension, tmp_path: Path) -> None:
    tiny.sources[0].write_text("#error no such thing\nint x")
    with pytest.raises(JitError, match=r"failed with exit status 1: .*no such thing") as caught:
        obtain(tiny, detect_cpu(), cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_missing_compiler_names_the_remedy(tiny: Extension, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(JitError, match=r"install g\+\+ .*or set CXX"):
        obtain(tiny, detect_cpu(), cache_dir=tmp_path / "cache")


def test_a_full_disk_is_an_os_error(tmp_path: Path) -> None:
    script = [sys.executable, "-c", "import sys; sys.exit('ld: final link failed: No space left on device')"]
    with pytest.raises(OSError, match="No space left"):
        toolchain.run(script)


def test_a_module_that_does_not_load_says_so(tiny: Extension, tmp_path: Path) -> None:
    result = obtain(tiny, detect_cpu(), cache_dir=tmp_path / "cache")
    result.path.write_bytes(b"not a shared object")
    with pytest.raises(JitError, match="does not load"):
        load("tiny", result)


def test_the_result_runs_in_a_fresh_process(tiny: Extension, tmp_path: Path) -> None:
    result = obtain(tiny, detect_cpu(), cache_dir=tmp_path / "cache")
    code = f"import sys; sys.path.insert(0, {str(result.path.parent)!r}); import tiny; print(tiny.answer())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "42"
