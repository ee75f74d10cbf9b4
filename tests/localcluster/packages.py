"""Debian packages that the local cluster and the image builds use."""

from __future__ import annotations

import os
import shutil
import subprocess

# A program that the package brings -> the package.
CLUSTER = {
    "containerd": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "iptables": "iptables",
    "ip": "iproute2",
    "openssl": "openssl",
}
CONTROL_PLANE = {name: CLUSTER[name] for name in ("ip", "openssl")}
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def missing(wanted: dict[str, str]) -> list[str]:
    """The packages whose program is not on this machine."""
    return sorted({package for program, package in wanted.items() if not shutil.which(program, path=SYSTEM_PATH)})


def install(wanted: dict[str, str]) -> list[str]:
    """Install what is missing with apt-get. Returns the packages installed."""
    absent = missing(wanted)
    if not absent:
        return []
    if not shutil.which("apt-get"):
        raise RuntimeError(f"these packages are missing and there is no apt-get to install them: {' '.join(absent)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "DEBCONF_NOWARNINGS": "yes"}
    quiet = ["apt-get", "-qq", "-o", "Dpkg::Use-Pty=0", "-o", "DPkg::Lock::Timeout=300"]
    # stdout carries the package manager's chatter; errors go to stderr and are kept.
    subprocess.run([*quiet, "update"], check=True, env=environment, stdout=subprocess.DEVNULL)
    command = [*quiet, "install", "--yes", "--no-install-recommends", *absent]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return absent
