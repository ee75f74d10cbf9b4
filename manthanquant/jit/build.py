"""Obtain a kernel: prebuilt, cached, or built once by whoever takes the lock first. Then load it."""

from __future__ import annotations

import atexit
import importlib.machinery
import importlib.util
import logging
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Literal

from manthanquant.contract import ENV_CACHE_DIR
from manthanquant.jit.arch import Arch, is_cuda
from manthanquant.jit.cache import KernelCache, Rejected
from manthanquant.jit.errors import JitError
from manthanquant.jit.key import Key, make_key
from manthanquant.jit.nvcc import CudaToolchain
from manthanquant.jit.spec import Extension
from manthanquant.jit.toolchain import CppToolchain, Toolchain

log = logging.getLogger(__name__)

PREBUILT_DIR = Path(__file__).parent.parent / "prebuilt"  # an image may ship kernels here, read-only

Source = Literal["Built", "Cached", "Prebuilt"]


@dataclass(frozen=True)
class BuildResult:
    """Where a kernel came from.

    Attributes:
        path: the shared object.
        digest: of its key.
        arch: what it was compiled for.
        source: whether it was built just now, found in the cache, or shipped.
        seconds: the build's time; None unless built just now.
        message: what was wrong with the cache on the way, one line; None for nothing.
    """

    path: Path
    digest: str
    arch: str
    source: Source
    seconds: float | None = None
    message: str | None = None


def default_cache_dir() -> Path:
    """`$MANTHANQUANT_CACHE_DIR/kernels`, else `kernels` in the user's cache directory."""
    configured = os.environ.get(ENV_CACHE_DIR)
    if configured:
        return Path(configured, "kernels")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "manthanquant", "kernels")


def toolchain_for(arch: Arch) -> Toolchain:
    return CudaToolchain() if is_cuda(arch) else CppToolchain()


def obtain(
    extension: Extension,
    arch: Arch,
    *,
    toolchain: Toolchain | None = None,
    cache_dir: Path | None = None,
    prebuilt_dir: Path = PREBUILT_DIR,
) -> BuildResult:
    """The compiled `extension` for `arch`.

    A cache that is corrupt is repaired; one that cannot be written (read-only, full, another user's) is replaced by a
    temporary directory for the life of this process. Either is said in one warning and in the result's message.
    Raises `JitError` where there is no kernel and none can be built.
    """
    toolchain = toolchain or toolchain_for(arch)
    flags = toolchain.flags(arch)
    shipped_key = make_key(extension, arch, flags, compiler=None)
    shipped = KernelCache(prebuilt_dir).find(extension.name, shipped_key)
    if isinstance(shipped, Path):
        return BuildResult(shipped, shipped_key.digest(), arch.name, "Prebuilt")
    complaint = _complain(shipped) if shipped else None
    key = make_key(extension, arch, flags, toolchain.identity())
    cache = KernelCache(cache_dir or default_cache_dir())
    try:
        result = _find_or_build(cache, extension, arch, key, toolchain)
    except OSError as error:
        complaint = f"kernel cache {cache.root} cannot be used ({error}): building in a temporary directory"
        log.warning(complaint)
        result = _build_privately(extension, arch, key, toolchain)
    return replace(result, message=result.message or complaint)


def ship(extension: Extension, arch: Arch, directory: Path, *, toolchain: Toolchain | None = None) -> BuildResult:
    """Build into `directory`, laid out as a prebuilt one. Raises `JitError`, and `OSError` if it cannot be written."""
    toolchain = toolchain or toolchain_for(arch)
    key = make_key(extension, arch, toolchain.flags(arch), compiler=None)
    return _find_or_build(KernelCache(directory), extension, arch, key, toolchain)


def load(name: str, result: BuildResult) -> ModuleType:
    """Import the module of a build. Raises `JitError` where the dynamic linker refuses it."""
    # Under a name of its own: pybind11 answers for a name it knows with the module it has, also from another build.
    own_name = f"{result.digest}.{name}"
    loader = importlib.machinery.ExtensionFileLoader(own_name, str(result.path))
    spec = importlib.util.spec_from_file_location(own_name, result.path, loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise JitError(f"kernel {result.path} does not load ({error}): delete its directory, then retry") from error
    return module


def _find_or_build(cache: KernelCache, extension: Extension, arch: Arch, key: Key, toolchain: Toolchain) -> BuildResult:
    found = cache.find(extension.name, key)
    if isinstance(found, Path):
        return BuildResult(found, key.digest(), arch.name, "Cached")
    with cache.lock(extension.name, key):
        found = cache.find(extension.name, key)  # another process may have built it while this one waited
        if isinstance(found, Path):
            return BuildResult(found, key.digest(), arch.name, "Cached")
        message = _complain(found) if found else None
        started = time.monotonic()
        path = cache.publish(extension.name, key, lambda work, out: _compile(toolchain, extension, arch, work, out))
        return BuildResult(path, key.digest(), arch.name, "Built", time.monotonic() - started, message)


def _build_privately(extension: Extension, arch: Arch, key: Key, toolchain: Toolchain) -> BuildResult:
    try:
        private = Path(tempfile.mkdtemp(prefix="manthanquant-kernels-"))
        atexit.register(shutil.rmtree, private, ignore_errors=True)
        return _find_or_build(KernelCache(private), extension, arch, key, toolchain)
    except OSError as error:
        raise JitError(
            f"neither the kernel cache nor a temporary directory can be written ({error}): "
            f"free some space, or set {ENV_CACHE_DIR} to a writable directory"
        ) from error


def _compile(toolchain: Toolchain, extension: Extension, arch: Arch, work: Path, output: Path) -> None:
    for name, text in extension.generated:
        (work / name).write_text(text)
    toolchain.compile(extension, arch, work, output)


def _complain(rejected: Rejected) -> str:
    line = f"kernel {rejected.path} is not used, {rejected.reason}: building it anew"
    log.warning(line)
    return line
