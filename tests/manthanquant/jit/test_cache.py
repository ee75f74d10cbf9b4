"""The kernel cache: built once, repaired when broken, never in the way. The toolchain here only writes bytes."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import manthanquant
from manthanquant import cli
from manthanquant.contract import ENV_CACHE_DIR
from manthanquant.jit import Arch, BuildResult, Extension, JitError, obtain
from manthanquant.jit.build import ship
from manthanquant.jit.cache import KernelCache
from manthanquant.jit.key import make_key

ARCH = Arch("cpu-test", ("-mtest",))
ROOT = os.geteuid() == 0


@dataclass
class Recorder:
    """A toolchain whose output is a function of its input, and which notes each use in a file."""

    log: Path
    version: str = "cc 1.0"
    seconds: float = 0.0
    fail_in: list[str] = field(default_factory=list)

    def flags(self, arch: Arch) -> tuple[str, ...]:
        return arch.flags

    def identity(self) -> str:
        return self.version

    def compile(self, extension: Extension, arch: Arch, work: Path, output: Path) -> None:
        with open(self.log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(self.seconds)
        if any(str(output).startswith(place) for place in self.fail_in):
            raise OSError(errno.ENOSPC, "No space left on device")
        output.write_bytes(b"module of " + extension.source_hash().encode() + b"\0" * 4096)

    @property
    def builds(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def extension(tmp_path: Path) -> Extension:
    source = tmp_path / "kernel.cpp"
    source.write_text("int x;")
    return Extension("kernel", (source,), generated=(("g.h", "1"),))


@pytest.fixture
def toolchain(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path / "builds")


@pytest.fixture(autouse=True)
def own_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A private build lives as long as its process, which a test runner may end without clean-up."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def get(extension: Extension, toolchain: Recorder, cache: Path) -> BuildResult:
    return obtain(extension, ARCH, toolchain=toolchain, cache_dir=cache, prebuilt_dir=cache / "none")


def good(extension: Extension) -> bytes:
    return b"module of " + extension.source_hash().encode() + b"\0" * 4096


def test_first_builds_then_finds(extension: Extension, toolchain: Recorder, tmp_path: Path) -> None:
    first, second = (get(extension, toolchain, tmp_path / "cache") for _ in range(2))
    assert (first.source, second.source, toolchain.builds) == ("Built", "Cached", 1)
    assert first.seconds is not None and second.seconds is None
    assert first.path == second.path and first.digest == second.digest
    assert first.message is second.message is None


def test_stamp_is_what_sha256sum_checks(extension: Extension, toolchain: Recorder, tmp_path: Path) -> None:
    path = get(extension, toolchain, tmp_path / "cache").path
    subprocess.run(["sha256sum", "--check", "--strict", f"{path.name}.sha256"], cwd=path.parent, check=True)


def test_nothing_else_is_left(extension: Extension, toolchain: Recorder, tmp_path: Path) -> None:
    entry = get(extension, toolchain, tmp_path / "cache").path.parent
    assert {path.name for path in entry.iterdir()} == {"kernel.so", "kernel.so.sha256", "key.json"}
    assert {path.name for path in entry.parent.iterdir()} == {entry.name, f"{entry.name}.lock"}


@pytest.mark.parametrize("change", ["source", "generated", "flags", "compiler", "arch"])
def test_every_input_changes_the_key(change: str, extension: Extension, toolchain: Recorder, tmp_path: Path) -> None:
    before = get(extension, toolchain, tmp_path / "cache")
    arch = ARCH
    if change == "source":
        extension.sources[0].write_text("int y;")
    elif change == "generated":
        extension = Extension(extension.name, extension.sources, generated=(("g.h", "2"),))
    elif change == "flags":
        extension = Extension(extension.name, extension.sources, generated=extension.generated, flags=("-DX",))
    elif change == "compiler":
        toolchain.version = "cc 2.0"
    else:
        arch = Arch("cpu-other", ARCH.flags)
    after = obtain(extension, arch, toolchain=toolchain, cache_dir=tmp_path / "cache", prebuilt_dir=tmp_path / "none")
    assert after.source == "Built" and after.digest != before.digest


def test_version_torch_and_python_are_in_the_key(extension: Extension, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = {make_key(extension, ARCH, (), "cc").digest(), make_key(extension, ARCH, (), "cc", torch="2.13").digest()}
    monkeypatch.setattr("manthanquant.__version__", "9.9")
    digests.add(make_key(extension, ARCH, (), "cc").digest())
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: ".cpython-399.so")
    digests.add(make_key(extension, ARCH, (), "cc").digest())
    assert len(digests) == 4


def _worker(extension: Extension, toolchain: Recorder, cache: Path, results: multiprocessing.Queue[str]) -> None:
    result = get(extension, toolchain, cache)
    results.put(f"{result.source} {hashlib.sha256(result.path.read_bytes()).hexdigest()}")


def test_eight_builders_build_once(extension: Extension, toolchain: Recorder, tmp_path: Path) -> None:
    toolchain.seconds = 0.3
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[str] = context.Queue()
    workers = [
        context.Process(target=_worker, args=(extension, toolchain, tmp_path / "cache", results)) for _ in range(8)
    ]
    for worker in workers:
        worker.start()
    answers = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    digest = hashlib.sha256(good(extension)).hexdigest()
    assert sorted(answers) == [f"Built {digest}", *[f"Cached {digest}"] * 7]
    assert toolchain.builds == 1


def test_a_killed_builder_leaves_no_lock_and_no_rubbish(
    extension: Extension, toolchain: Recorder, tmp_path: Path
) -> None:
    slow = Recorder(toolchain.log, seconds=60)
    worker = multiprocessing.get_context("fork").Process(target=get, args=(extension, slow, tmp_path / "cache"))
    worker.start()
    while not toolchain.builds:
        time.sleep(0.01)
    worker.kill()
    worker.join()
    result = get(extension, toolchain, tmp_path / "cache")
    assert result.source == "Built" and result.path.read_bytes() == good(extension)
    assert len(list(result.path.parent.parent.iterdir())) == 2


def _truncate(module: Path) -> None:
    os.truncate(module, 100)


def _corrupt(module: Path) -> None:
    data = bytearray(module.read_bytes())
    data[50] ^= 1
    module.write_bytes(data)


def _empty_stamp(module: Path) -> None:
    module.with_name(module.name + ".sha256").write_bytes(b"")


def _binary_stamp(module: Path) -> None:
    module.with_name(module.name + ".sha256").write_bytes(b"\xff\xfe")


def _no_stamp(module: Path) -> None:
    module.with_name(module.name + ".sha256").unlink()


def _no_module(module: Path) -> None:
    module.unlink()


def _another_build(module: Path) -> None:
    key = module.parent / "key.json"
    key.write_text(key.read_text().replace("cpu-test", "cpu-best"))


def _a_file(module: Path) -> None:
    for path in module.parent.iterdir():
        path.unlink()
    module.parent.rmdir()
    module.parent.write_text("not a directory")


BREAKS = [_truncate, _corrupt, _empty_stamp, _binary_stamp, _no_stamp, _no_module, _another_build, _a_file]


@pytest.mark.parametrize("break_it", BREAKS)
def test_a_broken_entry_is_reported_once_and_repaired(
    break_it: object,
    extension: Extension,
    toolchain: Recorder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = get(extension, toolchain, tmp_path / "cache").path
    assert callable(break_it)
    break_it(path)
    result = get(extension, toolchain, tmp_path / "cache")
    assert result.source == "Built" and result.path == path and path.read_bytes() == good(extension)
    (line,) = (record.getMessage() for record in caplog.records)
    assert str(path.parent) in line and "building it anew" in line and "\n" not in line
    assert result.message == line
    assert get(extension, toolchain, tmp_path / "cache").source == "Cached"


DAY = 86400


def _aged(entry: Path, days: float) -> Path:
    then = time.time() - days * DAY
    os.utime(entry, (then, then))
    return entry


def test_pruning_removes_what_other_versions_left_long_ago(
    extension: Extension, toolchain: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    ours = _aged(get(extension, toolchain, cache).path.parent, 90)
    with monkeypatch.context() as patch:
        patch.setattr("manthanquant.__version__", "0.0.1")
        old = _aged(get(extension, toolchain, cache).path.parent, 31)
        patch.setattr("manthanquant.__version__", "0.0.2")
        recent = _aged(get(extension, toolchain, cache).path.parent, 29)
    broken = _aged(_with_unreadable_key(cache), 31)
    assert KernelCache(cache).prune(manthanquant.__version__, 30 * DAY) == sorted([old, broken])
    assert ours.exists() and recent.exists() and not old.exists() and not broken.exists()
    assert not list(cache.glob("*/.*"))
    assert get(extension, toolchain, cache).source == "Cached"


def _with_unreadable_key(cache: Path) -> Path:
    entry = cache / "cpu-test" / "kernel-0123"
    entry.mkdir()
    (entry / "key.json").write_text("[]")
    return entry


def test_the_command_prunes_and_says_what(
    extension: Extension,
    toolchain: Recorder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(ENV_CACHE_DIR, str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("manthanquant.__version__", "0.0.1")
        entry = _aged(get(extension, toolchain, tmp_path / "kernels").path.parent, 3)
    assert cli.main(["build", "--prune"]) == 0 and entry.exists()
    assert cli.main(["build", "--prune", "--older-than=2"]) == 0 and not entry.exists()
    assert capsys.readouterr().out == f"removed {entry}\n"


@pytest.mark.skipif(not ROOT, reason="only root can give files away")
def test_another_users_entry_is_not_loaded(
    extension: Extension, toolchain: Recorder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = get(extension, toolchain, tmp_path / "cache").path
    os.chown(path.parent, 12345, 12345)
    assert get(extension, toolchain, tmp_path / "cache").source == "Built"
    assert "belongs to user 12345" in caplog.text


def test_an_unwritable_cache_is_reported_and_bypassed(
    extension: Extension, toolchain: Recorder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocker = tmp_path / "cache"
    blocker.write_text("a file where the directory should be")
    result = get(extension, toolchain, blocker)
    assert result.source == "Built" and result.path.read_bytes() == good(extension)
    (line,) = (record.getMessage() for record in caplog.records)
    assert str(blocker) in line and "temporary directory" in line and result.message == line


@pytest.mark.skipif(not ROOT, reason="only root can become another user")
def test_a_read_only_cache_is_reported_and_bypassed() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # pytest's own is closed to other users
        os.chmod(directory, 0o755)
        scratch, cache = Path(directory, "scratch"), Path(directory, "cache")
        scratch.mkdir()
        scratch.chmod(0o777)
        cache.mkdir(mode=0o755)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setgid(65534)
                os.setuid(65534)
                tempfile.tempdir = str(scratch)
                extension = Extension("kernel", ())
                result = get(extension, Recorder(Path(os.devnull)), cache)
                whole = result.source == "Built" and result.path.read_bytes() == good(extension)
                status = 0 if whole and f"{cache} cannot be used" in (result.message or "") else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not os.listdir(cache)


def test_a_full_disk_is_reported_and_bypassed(
    extension: Extension, toolchain: Recorder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toolchain.fail_in = [str(tmp_path / "cache")]
    result = get(extension, toolchain, tmp_path / "cache")
    assert result.source == "Built" and result.path.read_bytes() == good(extension)
    assert "No space left" in caplog.text and len(caplog.records) == 1


def test_no_room_anywhere_names_the_remedy(extension: Extension, toolchain: Recorder, tmp_path: Path) -> None:
    toolchain.fail_in = ["/"]
    with pytest.raises(JitError, match=r"free some space, or set MANTHANQUANT_CACHE_DIR"):
        get(extension, toolchain, tmp_path / "cache")


def test_a_readable_entry_of_a_read_only_cache_is_used(
    extension: Extension, toolchain: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get(extension, toolchain, tmp_path / "cache")
    monkeypatch.setattr(KernelCache, "lock", lambda *_: pytest.fail("a warm load takes no lock"))
    assert get(extension, toolchain, tmp_path / "cache").source == "Cached"


def test_shipped_kernels_need_no_compiler(extension: Extension, toolchain: Recorder, tmp_path: Path) -> None:
    ship(extension, ARCH, tmp_path / "prebuilt", toolchain=toolchain)

    class NoCompiler(Recorder):
        def identity(self) -> str:
            raise JitError("no C++ compiler")

    none = NoCompiler(tmp_path / "none")
    result = obtain(extension, ARCH, toolchain=none, cache_dir=tmp_path / "c", prebuilt_dir=tmp_path / "prebuilt")
    assert result.source == "Prebuilt" and result.path.read_bytes() == good(extension)
    assert not (tmp_path / "c").exists()


def test_a_broken_shipped_kernel_is_reported_and_built(
    extension: Extension, toolchain: Recorder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _corrupt(ship(extension, ARCH, tmp_path / "prebuilt", toolchain=toolchain).path)
    result = obtain(extension, ARCH, toolchain=toolchain, cache_dir=tmp_path / "c", prebuilt_dir=tmp_path / "prebuilt")
    assert result.source == "Built" and "checksum does not match" in (result.message or "")
    assert len(caplog.records) == 1
