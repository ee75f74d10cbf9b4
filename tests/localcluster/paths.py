"""Where the local cluster keeps things on this machine."""

from __future__ import annotations

import os
from pathlib import Path

SOURCE_DIR = Path(__file__).resolve().parent


def cache_dir() -> Path:
    """`${XDG_CACHE_HOME:-~/.cache}/manthanquant`: binaries, images and the state of running clusters."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "manthanquant"


def bin_dir() -> Path:
    return cache_dir() / "bin"


def instance_dir(name: str) -> Path:
    return cache_dir() / "clusters" / name


def image_store() -> Path:
    """containerd's folder for clusters that keep their images; one cluster at a time uses it."""
    return cache_dir() / "images"
