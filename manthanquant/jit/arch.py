"""Which instruction set to compile for.

A CPU is one of three levels; each is a superset of the next. A GPU is what its compute capability names.
"""

from __future__ import annotations

import platform
from collections.abc import Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from manthanquant.jit.errors import JitError


@dataclass(frozen=True)
class Arch:
    """A target of the compiler.

    Attributes:
        name: e.g. `cpu-avx512`; goes into reports and into the cache's directory names.
        flags: compiler flags that select it.
        cpu_features: names in `/proc/cpuinfo` that a CPU must have to run the result.
    """

    name: str
    flags: tuple[str, ...] = ()
    cpu_features: frozenset[str] = frozenset()


# The AVX-512 path wants byte permutes (VBMI) and int8 dot products (VNNI): Ice Lake, Zen 4 and newer. A CPU with an
# older AVX-512 runs the AVX2 path.
_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vbmi", "avx512_vnni")
_CPUINFO_NAMES = {"avx512_vbmi": "avx512vbmi"}  # where the kernel's name is not the compiler's with `_`


def _level(name: str, features: tuple[str, ...]) -> Arch:
    flags = tuple("-m" + feature.replace("avx512_", "avx512") for feature in features)
    return Arch(name, flags, frozenset(_CPUINFO_NAMES.get(feature, feature) for feature in features))


CPU_AVX512 = _level("cpu-avx512", _AVX512)
CPU_AVX2 = _level("cpu-avx2", _AVX2)
CPU_GENERIC = Arch("cpu-generic")
CPU_ARCHES = (CPU_AVX512, CPU_AVX2, CPU_GENERIC)  # best first


def best_cpu(machine: str, features: Set[str]) -> Arch:
    """The best level that a CPU of this `uname` machine with these `/proc/cpuinfo` flags runs."""
    if machine != "x86_64":
        return CPU_GENERIC
    return next(arch for arch in CPU_ARCHES if arch.cpu_features <= features)


@cache
def detect_cpu() -> Arch:
    """The level of this machine. Without a readable `/proc/cpuinfo` it is the portable one."""
    return best_cpu(platform.machine(), _cpu_features(Path("/proc/cpuinfo")))


def _cpu_features(cpuinfo: Path) -> frozenset[str]:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


# The least compute capability that each serves; `a` has the instructions of that capability alone.
_CUDA_CAPABILITIES = {"80": (8, 0), "86": (8, 6), "89": (8, 9), "90a": (9, 0), "100a": (10, 0), "120a": (12, 0)}
# Sources see the capability as MQ_SM, in host code too.
CUDA_ARCHES = tuple(
    Arch(f"sm_{name}", (f"-gencode=arch=compute_{name},code=sm_{name}", f"-DMQ_SM={10 * least[0] + least[1]}"))
    for name, least in _CUDA_CAPABILITIES.items()
)
ARCHES = (*CPU_ARCHES, *CUDA_ARCHES)


def is_cuda(arch: Arch) -> bool:
    return arch in CUDA_ARCHES


def cuda_arch(capability: tuple[int, int]) -> Arch:
    """What a GPU of this compute capability runs: code of the same major and no higher minor version, `a` exactly.

    Raises `JitError` for a capability that nothing here serves.
    """
    serving = [
        arch
        for arch, (name, least) in zip(CUDA_ARCHES, _CUDA_CAPABILITIES.items())
        if (least == capability if name.endswith("a") else least[0] == capability[0] and least <= capability)
    ]
    if not serving:
        names = ", ".join(f"{major}.{minor}" for major, minor in _CUDA_CAPABILITIES.values())
        found = ".".join(map(str, capability))
        raise JitError(f"a GPU of compute capability {found} is not supported: use one of {names}")
    return serving[-1]


def named(name: str) -> Arch:
    """The architecture called `name`. Raises `JitError` for an unknown one."""
    for arch in ARCHES:
        if arch.name == name:
            return arch
    raise JitError(f"architecture {name!r} is unknown: use one of {', '.join(arch.name for arch in ARCHES)}")
