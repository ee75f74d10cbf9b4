"""How to compile: the C++ compiler and its command lines."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from manthanquant.jit.arch import Arch
from manthanquant.jit.errors import JitError
from manthanquant.jit.spec import Extension


class Toolchain(Protocol):
    """Turns an `Extension` into a shared object."""

    def flags(self, arch: Arch) -> tuple[str, ...]:
        """The toolchain's own flags for `arch`; part of the key."""

    def identity(self) -> str:
        """The compiler and its version; part of the key. Raises `JitError` where there is no compiler."""

    def compile(self, extension: Extension, arch: Arch, work: Path, output: Path) -> None:
        """Compile into `output`, by way of files under `work`. Raises `JitError`, or `OSError` for a full disk."""


@dataclass(frozen=True)
class CppToolchain:
    """g++, clang++ or whatever `$CXX` names. The result depends on no PyTorch: only pybind11's and Python's headers."""

    def flags(self, arch: Arch) -> tuple[str, ...]:
        # No -ffast-math: NaN and infinity must be seen. FMA, and reassociation in marked loops, are enough.
        language = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wno-psabi")
        return (*language, "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", *arch.flags)

    def identity(self) -> str:
        return _compiler()[1]

    def compile(self, extension: Extension, arch: Arch, work: Path, output: Path) -> None:
        directories = dict.fromkeys(path.parent for path in (*extension.sources, *extension.headers))
        command = self.command(arch, [work, *directories], extension.flags)
        objects = [work / f"{source.stem}.o" for source in extension.sources]
        compile_objects([[*command, "-c", str(source), "-o", str(o)] for source, o in zip(extension.sources, objects)])
        run([*self.linker(), *map(str, objects), "-o", str(output)])

    def command(self, arch: Arch, includes: Sequence[Path], flags: Sequence[str]) -> list[str]:
        """The start of a compile command: compiler, flags, and `includes` with Python's and pybind11's headers."""
        directories = [*includes, *_python_includes()]
        return [*_compiler()[0], *self.flags(arch), *flags, *(f"-I{path}" for path in directories)]

    def linker(self) -> list[str]:
        """The start of the command that links objects into a module."""
        return [*_compiler()[0], "-shared", "-fopenmp"]


def compile_objects(commands: Sequence[Sequence[str]]) -> None:
    """Run the commands, as many at once as this process has CPUs. Raises `JitError` for the first that fails."""
    with ThreadPoolExecutor(max_workers=min(len(commands), len(os.sched_getaffinity(0)))) as pool:
        list(pool.map(run, commands))


def run(command: Sequence[str]) -> None:
    """Run a compiler. Raises `JitError` with its first error line, or `OSError` where the disk is full."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise JitError(f"cannot start {command[0]}: {error}") from error
    if done.returncode:
        if "No space left on device" in done.stderr:
            raise OSError(errno.ENOSPC, "No space left on device")
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        reason = lines[0].strip() if lines else "no message"
        raise JitError(f"{Path(command[0]).name} failed with exit status {done.returncode}: {reason}")


@cache
def _compiler() -> tuple[tuple[str, ...], str]:
    """The command and the version line of the C++ compiler."""
    wanted = os.environ.get("CXX")
    for command in [wanted.split()] if wanted else [["g++"], ["c++"], ["clang++"]]:
        path = shutil.which(command[0])
        if path:
            done = subprocess.run([path, *command[1:], "--version"], capture_output=True, text=True)
            if done.returncode == 0 and done.stdout:
                return (path, *command[1:]), done.stdout.splitlines()[0]
    looked = f"CXX={wanted}" if wanted else "g++, c++ and clang++"
    raise JitError(f"no C++ compiler ({looked}): install g++ (Debian: apt-get install g++), or set CXX")


def _python_includes() -> list[Path]:
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").exists():
        raise JitError(f"no Python.h in {include}: install Python's headers (Debian: apt-get install python3-dev)")
    try:
        import pybind11
    except ImportError as error:
        raise JitError("no pybind11: pip install pybind11") from error
    return [include, Path(pybind11.get_include())]
