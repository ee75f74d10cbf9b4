"""What to compile: sources, headers and definitions of one extension module."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Extension:
    """A Python extension module.

    Attributes:
        name: the module's name, `PyInit_<name>` in the binary.
        sources: files to compile.
        headers: files that the sources include; only read for the key.
        generated: name and text of headers made by Python, put on the include path.
        flags: compiler flags beyond the toolchain's and the architecture's own.
    """

    name: str
    sources: tuple[Path, ...]
    headers: tuple[Path, ...] = ()
    generated: tuple[tuple[str, str], ...] = ()
    flags: tuple[str, ...] = ()

    def source_hash(self) -> str:
        """sha256 over the names and contents of every source, header and generated header."""
        digest = hashlib.sha256()
        files = [(path.name, path.read_bytes()) for path in (*self.sources, *self.headers)]
        for name, data in (*files, *((name, text.encode()) for name, text in self.generated)):
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
        return digest.hexdigest()
