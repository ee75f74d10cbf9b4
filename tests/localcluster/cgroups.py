"""The control group that holds a cluster, on cgroup v1 and v2.

Inside the node this group is the root of every hierarchy, so the kubelet's groups are below it and go with it.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
CLONE_NEWCGROUP = 0x02000000
# On v2 a group that has processes cannot give controllers to children; the node's own processes sit in this leaf.
LEAF = "node"
CONTROLLERS = ("cpuset", "cpu", "io", "memory", "hugetlb", "pids")


def is_v2(root: Path | None = None) -> bool:
    return ((root or ROOT) / "cgroup.controllers").exists()


def hierarchies(root: Path | None = None) -> list[Path]:
    """The mount points to make a group in: one on v2; on v1 each controller's, links and the empty v2 one left out."""
    root = root or ROOT
    if is_v2(root):
        return [root]
    folders = (path for path in sorted(root.iterdir()) if path.is_dir() and not path.is_symlink())
    return [path for path in folders if (path / "cgroup.procs").exists() and not is_v2(path)]


def groups(name: str) -> list[Path]:
    return [path / name for path in hierarchies()]


def create(name: str) -> list[str]:
    """Make the group. Returns the v2 controllers that had to be switched on at the root, for `remove` to revert."""
    added = []
    if is_v2():
        offered = (ROOT / "cgroup.controllers").read_text().split()
        enabled = (ROOT / "cgroup.subtree_control").read_text().split()
        added = [controller for controller in CONTROLLERS if controller in offered and controller not in enabled]
        for controller in added:
            (ROOT / "cgroup.subtree_control").write_text(f"+{controller}")
    for group in groups(name):
        group.mkdir()
        for setting in ("cpuset.cpus", "cpuset.mems"):
            if not is_v2() and (group / setting).exists():
                (group / setting).write_text((group.parent / setting).read_text())
    return added


def enter(name: str) -> None:
    """Move this process into the group and make the group the root that it sees."""
    for group in groups(name):
        (group / "cgroup.procs").write_text(str(os.getpid()))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWCGROUP):
        raise OSError(ctypes.get_errno(), "cannot make a cgroup namespace")
    if is_v2():
        leaf = ROOT / name / LEAF
        leaf.mkdir()
        (leaf / "cgroup.procs").write_text(str(os.getpid()))


def remount() -> None:
    """Inside the node: mount the hierarchies again, so that they start at the cluster's group."""
    if is_v2():
        subprocess.run(["umount", "-R", str(ROOT)], check=True)
        subprocess.run(["mount", "-t", "cgroup2", "cgroup2", str(ROOT)], check=True)
        for controller in (ROOT / "cgroup.controllers").read_text().split():
            if controller in CONTROLLERS:
                (ROOT / "cgroup.subtree_control").write_text(f"+{controller}")
        return
    names = [path.name for path in hierarchies()]
    links = {path.name: os.readlink(path) for path in ROOT.iterdir() if path.is_symlink()}
    subprocess.run(["umount", "-R", str(ROOT)], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "cgroup", str(ROOT)], check=True)
    for name in names:
        (ROOT / name).mkdir()
        option = "none,name=systemd" if name == "systemd" else name
        subprocess.run(["mount", "-t", "cgroup", "-o", option, "cgroup", str(ROOT / name)], check=True)
    for name, target in links.items():
        (ROOT / name).symlink_to(target)


def processes(name: str) -> list[int]:
    """Host process ids in the group and below it."""
    found: set[int] = set()
    for group in groups(name):
        for path in group.rglob("cgroup.procs"):
            try:
                found.update(int(pid) for pid in path.read_text().split())
            except OSError:  # the group went while it was read
                continue
    return sorted(found)


def running(name: str, program: str) -> list[int]:
    """Those of `processes` that run a program, by its path."""
    found = []
    for pid in processes(name):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):  # it ended since it was listed
            continue
        if command.startswith(f"{program}\0".encode()):
            found.append(pid)
    return found


def remove(name: str, added: list[str], timeout: float = 15.0) -> None:
    """Remove the group and all below it, once its processes are gone; the kernel may say busy for a moment."""
    deadline = time.monotonic() + timeout
    while True:
        left = [group for group in groups(name) if group.exists() and not _remove_tree(group)]
        if not left:
            break
        if time.monotonic() > deadline:
            raise RuntimeError(f"cgroup {left[0]} is still in use by processes {processes(name)}")
        time.sleep(0.05)
    for controller in added:
        try:
            (ROOT / "cgroup.subtree_control").write_text(f"-{controller}")
        except OSError:  # somebody else uses it by now
            continue


def _remove_tree(group: Path) -> bool:
    folders = [path for path in group.rglob("*") if path.is_dir()]
    for folder in [*sorted(folders, key=lambda path: len(path.parts), reverse=True), group]:
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return False
    return True
