"""Start the node: `python -m localcluster.launch NAME LISTEN_FD`, in a session of its own.

Enters the cluster's control group and becomes `unshare`, whose child is the node's pid 1. Killing `unshare` kills pid
1, and with it every process, mount and network interface of the cluster.
"""

from __future__ import annotations

import os
import sys

from localcluster import cgroups, paths
from localcluster.config import Instance

NAMESPACES = ("--mount", "--pid", "--net", "--uts", "--ipc")


def main(name: str, listen_fd: str) -> None:
    instance = Instance.from_json((paths.instance_dir(name) / "instance.json").read_text())
    cgroups.enter(instance.cgroup)
    isolation = (*NAMESPACES, "--fork", "--kill-child=KILL", "--mount-proc", "--propagation", "private")
    node = (sys.executable, "-m", "localcluster.node", name, listen_fd)
    os.execvp("unshare", ["unshare", *isolation, "--", *node])


if __name__ == "__main__":
    main(*sys.argv[1:])
