"""The name of a build: everything that could change its bytes, or whether this process can load them."""

from __future__ import annotations

import hashlib
import json
import platform
import sysconfig
from dataclasses import asdict, dataclass

import manthanquant
from manthanquant.jit.arch import Arch
from manthanquant.jit.spec import Extension


@dataclass(frozen=True)
class Key:
    """The inputs of one build.

    Attributes:
        package: our version.
        arch: the target, e.g. `cpu-avx512`.
        torch: PyTorch's version where the extension is compiled against it, else None (ours are not).
        compiler: the compiler's version line; None for a prebuilt artifact, which any compiler may have made.
        python: the extension suffix, which carries the Python tag and the platform.
        libc: the C library that the result links to.
        sources: sha256 over sources, headers and generated headers.
        flags: every compiler flag.
    """

    package: str
    arch: str
    torch: str | None
    compiler: str | None
    python: str
    libc: str
    sources: str
    flags: tuple[str, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    def digest(self) -> str:
        """The first 16 hex digits of the sha256 of the JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def make_key(
    extension: Extension, arch: Arch, flags: tuple[str, ...], compiler: str | None, torch: str | None = None
) -> Key:
    return Key(
        package=manthanquant.__version__,
        arch=arch.name,
        torch=torch,
        compiler=compiler,
        python=sysconfig.get_config_var("EXT_SUFFIX"),
        libc=" ".join(platform.libc_ver()),
        sources=extension.source_hash(),
        flags=(*flags, *extension.flags),
    )
