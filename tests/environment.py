"""Makes the tests' virtual environment, `.venv`: `python3 tests/environment.py`. Safe to run again at any time.

Standard library only: it runs with the system's Python, before anything is installed. The environment is made anew when
`tests/environment.lock` changes; one that is complete costs a check of a stamp file.

The packages are those of the CPU server image (`image/`), so vLLM's own PyTorch pin is replaced by the plain build of
the same version, without its CUDA libraries; `image/cuda_stubs.py` says how it loads all the same.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from localcluster import packages

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
LOCK = ROOT / "tests/environment.lock"
STUBS = ROOT / "image/cuda_stubs.py"
STAMP = ENVIRONMENT / "complete"
# A program that the package brings -> the package.
SYSTEM = {"g++": "g++", "make": "make", "readelf": "binutils", "git": "git"}


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def run(*command: str | Path, **environment: str) -> None:
    subprocess.run([str(part) for part in command], check=True, env={**os.environ, **environment})


def python() -> str:
    """A Python 3.11 to 3.13 that can make virtual environments; Debian's own where there is none."""
    version = (3, 11) <= sys.version_info[:2] <= (3, 13)
    able = subprocess.run([sys.executable, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0
    headers = subprocess.run(
        [sys.executable, "-c", "import sysconfig, os; os.stat(sysconfig.get_path('include') + '/Python.h')"],
        capture_output=True,
    )
    if version and able and headers.returncode == 0:
        return sys.executable
    say("installing python3-venv and python3-dev")
    packages.install({"/usr/share/doc/python3-venv": "python3-venv", "/usr/share/doc/python3-dev": "python3-dev"})
    return "/usr/bin/python3"


def make() -> None:
    packages.install(SYSTEM)
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    started = time.monotonic()
    say("making .venv (about 1 GB of packages; once)")
    run(python(), "-m", "venv", ENVIRONMENT)
    interpreter = ENVIRONMENT / "bin/python"
    run(interpreter, "-m", "pip", "install", "--quiet", "uv")
    run(
        ENVIRONMENT / "bin/uv",
        "pip",
        "install",
        "--python",
        interpreter,
        "--no-deps",
        "--require-hashes",
        "--requirements",
        LOCK,
    )
    (library,) = ENVIRONMENT.glob("lib/python3*/site-packages/torch/lib")
    run(interpreter, STUBS, library)
    say("compiling to bytecode (a server starts three processes, each would do it anew)")
    # Some packages carry templates that are no valid Python; compileall reports them by its exit code.
    subprocess.run([interpreter, "-m", "compileall", "-q", "-j", "0", ENVIRONMENT / "lib"], stdout=subprocess.DEVNULL)
    say(f".venv is ready ({time.monotonic() - started:.0f} s)")


def main() -> None:
    digest = hashlib.sha256(LOCK.read_bytes() + STUBS.read_bytes()).hexdigest()
    if not STAMP.exists() or STAMP.read_text() != digest:
        make()
        STAMP.write_text(digest)


if __name__ == "__main__":
    main()
