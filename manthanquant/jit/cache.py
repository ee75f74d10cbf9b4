"""The kernel cache on disk: one directory a build, whole or absent.

    <root>/<arch>/<name>-<digest>/<name>.so          the module
                                  <name>.so.sha256   its checksum, as `sha256sum --check` reads it
                                  key.json           the build's inputs
    <root>/<arch>/<name>-<digest>.lock               held while one process builds it

A build is written into a temporary directory beside its place, synced, and renamed whole. A reader trusts an entry only
if checksum and key agree and its owner is this user or root; anything else is reported in one line and built anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from manthanquant.jit.key import Key

KEY_FILE = "key.json"


@dataclass(frozen=True)
class Rejected:
    """An entry that exists and cannot be trusted."""

    path: Path
    reason: str


@dataclass(frozen=True)
class KernelCache:
    """A cache directory. It need not exist, and need not be writable for `find`."""

    root: Path

    def entry(self, name: str, key: Key) -> Path:
        return self.root / key.arch / f"{name}-{key.digest()}"

    def find(self, name: str, key: Key) -> Path | Rejected | None:
        """The module of a whole, trusted entry; why it is not one; or None where there is none."""
        entry = self.entry(name, key)
        module = entry / f"{name}.so"
        try:
            if not entry.exists():
                return None
            owner = entry.stat().st_uid
            if owner not in (0, os.geteuid()):
                return Rejected(entry, f"it belongs to user {owner}")
            stamp, data, found = _stamp(module).read_text(), module.read_bytes(), (entry / KEY_FILE).read_text()
        except (OSError, UnicodeDecodeError) as error:
            return Rejected(entry, f"it cannot be read: {error}")
        if found != key.to_json():
            return Rejected(entry, f"{KEY_FILE} describes another build")
        if stamp != _checksum_line(module.name, data):
            return Rejected(entry, "the checksum does not match")
        return module

    @contextlib.contextmanager
    def lock(self, name: str, key: Key) -> Iterator[None]:
        """Exclusive among processes; the system frees it when its holder dies. Raises `OSError`."""
        entry = self.entry(name, key)
        entry.parent.mkdir(parents=True, exist_ok=True)
        with open(entry.with_name(entry.name + ".lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def publish(self, name: str, key: Key, build: Callable[[Path, Path], None]) -> Path:
        """Run `build(work, output)` and put its module in place; returns the module's path.

        Call it under `lock`. Raises `OSError` where the cache cannot be written, and what `build` raises.
        """
        entry = self.entry(name, key)
        entry.parent.mkdir(parents=True, exist_ok=True)
        for left in entry.parent.glob(f".{entry.name}-*"):  # of a builder that was killed; the lock is ours now
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{entry.name}-", dir=entry.parent) as scratch:
            work, fresh = Path(scratch, "work"), Path(scratch, "entry")
            work.mkdir()
            fresh.mkdir()
            module = fresh / f"{name}.so"
            build(work, module)
            _stamp(module).write_text(_checksum_line(module.name, module.read_bytes()))
            (fresh / KEY_FILE).write_text(key.to_json())
            for path in (*fresh.iterdir(), fresh):
                _sync(path)
            if entry.exists():  # an entry that `find` rejected: out of the way, then gone with the scratch directory
                os.rename(entry, Path(scratch, "rejected"))
            os.rename(fresh, entry)
            _sync(entry.parent)
        return entry / module.name

    def prune(self, package: str, older_than: float) -> list[Path]:
        """Remove the entries that another version than `package` made, at least `older_than` seconds ago.

        Returns them. A process that has one loaded keeps it, and one that looks for it later builds it anew. The lock
        files, which are empty, stay: somebody may hold one. Raises `OSError`.
        """
        latest = time.time() - older_than
        pruned = []
        for key_file in sorted(self.root.glob(f"*/*/{KEY_FILE}")):
            entry = key_file.parent
            if _package(key_file) == package or entry.stat().st_mtime > latest:
                continue
            with tempfile.TemporaryDirectory(prefix=f".{entry.name}-", dir=entry.parent) as scratch:
                os.rename(entry, Path(scratch, "pruned"))  # at once, so that nobody finds half of it
            pruned.append(entry)
        return pruned


def _package(key_file: Path) -> str | None:
    """The package version that a key names; None for a key that cannot be read, which no version can use."""
    try:
        return str(json.loads(key_file.read_text())["package"])
    except (ValueError, KeyError, TypeError):
        return None


def _stamp(module: Path) -> Path:
    return module.with_name(module.name + ".sha256")


def _checksum_line(name: str, data: bytes) -> str:
    return f"{hashlib.sha256(data).hexdigest()}  {name}\n"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
