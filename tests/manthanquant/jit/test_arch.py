from __future__ import annotations

from pathlib import Path

import pytest

from manthanquant.jit import JitError, detect_cpu, named
from manthanquant.jit.arch import CPU_ARCHES, CPU_AVX2, CPU_AVX512, CPU_GENERIC, _cpu_features, best_cpu

ZEN4 = ["avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512_vnni"]


@pytest.mark.parametrize(
    ("machine", "features", "expected"),
    [
        ("x86_64", ZEN4, CPU_AVX512),
        ("x86_64", [f for f in ZEN4 if f != "avx512_vnni"], CPU_AVX2),  # Skylake server
        ("x86_64", ["avx2"], CPU_GENERIC),  # FMA masked by the hypervisor
        ("x86_64", [], CPU_GENERIC),
        ("aarch64", ["asimd"], CPU_GENERIC),
    ],
)
def test_best_level(machine: str, features: list[str], expected: object) -> None:
    assert best_cpu(machine, frozenset(features)) is expected


def test_flags_select_what_the_features_promise() -> None:
    assert "-mavx512vbmi" in CPU_AVX512.flags and "avx512vbmi" in CPU_AVX512.cpu_features
    assert "-mavx512vnni" in CPU_AVX512.flags and "avx512_vnni" in CPU_AVX512.cpu_features
    assert set(CPU_AVX2.flags) < set(CPU_AVX512.flags)


def test_features_come_from_the_flags_line(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("model name : x\nflags\t\t: fpu avx2\nbugs : none\n")
    assert _cpu_features(tmp_path / "cpuinfo") == {"fpu", "avx2"}
    assert _cpu_features(tmp_path / "missing") == frozenset()


def test_names() -> None:
    assert detect_cpu() in CPU_ARCHES
    assert all(named(arch.name) is arch for arch in CPU_ARCHES)
    with pytest.raises(JitError, match=r"'cpu-sse9' is unknown: use one of cpu-avx512"):
        named("cpu-sse9")
