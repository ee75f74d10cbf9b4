"""`python -m localcluster`: start, stop and inspect one-node Kubernetes clusters on this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from localcluster import binaries, lifecycle, paths


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="localcluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("--name", default="demo", help="the cluster's name (default: %(default)s)")
        return added

    up = command("up", "start a cluster and wait until it is ready")
    up.add_argument("--port", type=int, help="the API server's port on 127.0.0.1 (default: 16443 or a free one)")
    up.add_argument("--control-plane", action="store_true", help="no node: no kubelet and no containers")
    up.add_argument("--keep-images", action="store_true", help="use the image store that outlives clusters")
    down = command("down", "stop a cluster and remove all it made")
    down.add_argument("--all", action="store_true", help="every cluster of this user")
    command("status", "show a cluster's nodes and pods")
    load = command("import", "load image archives into a cluster")
    load.add_argument("archive", type=Path, nargs="+")
    commands.add_parser("build", help="build every program, helm and kubeconform too, and print their folder")
    return parser


def _status(name: str) -> None:
    cluster = lifecycle.find(name)
    if not cluster:
        raise lifecycle.ClusterError(f"no cluster {name!r} is running; start it with: up --name {name}")
    print(f"export KUBECONFIG={cluster.kubeconfig} PATH={paths.bin_dir()}:$PATH")
    print(cluster.kubectl("get", "nodes,pods", "--all-namespaces", "--output=wide"), end="")


def main() -> int:
    arguments = _parser().parse_args()
    try:
        if arguments.command == "up":
            nodes = not arguments.control_plane
            cluster = lifecycle.up(arguments.name, arguments.port, nodes, arguments.keep_images)
            print(f"export KUBECONFIG={cluster.kubeconfig} PATH={paths.bin_dir()}:$PATH")
        elif arguments.command == "down":
            for name in lifecycle.names() if arguments.all else [arguments.name]:
                lifecycle.down(name)
        elif arguments.command == "status":
            _status(arguments.name)
        elif arguments.command == "import":
            running = lifecycle.find(arguments.name)
            if not running:
                raise lifecycle.ClusterError(f"no cluster {arguments.name!r} is running")
            for archive in arguments.archive:
                running.import_image(archive)
        else:
            print(binaries.ensure((*binaries.CLUSTER, *binaries.TOOLS)))
    except (lifecycle.ClusterError, ValueError, RuntimeError) as error:
        print(f"localcluster: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
