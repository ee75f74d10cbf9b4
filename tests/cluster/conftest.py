"""A real control plane for the tests in this folder.

`control_plane` has an API server, etcd, the controller manager, the scheduler and a storage provisioner, but no node:
Deployments make pods and garbage is collected, while pods stay pending unless the test plays the kubelet.

`MANTHANQUANT_TEST_CLUSTER=NAME` uses the running cluster of that name, and leaves it running.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from localcluster import lifecycle
from localcluster.lifecycle import Cluster


def _remove_clusters_of_dead_runs() -> None:
    """A killed test run cannot stop its cluster; the next one does."""
    for name in lifecycle.names():
        match = re.fullmatch(r"test-(\d+)", name)
        if match and not Path("/proc", match[1]).exists():
            lifecycle.down(name)


@pytest.fixture(scope="session")
def control_plane() -> Iterator[Cluster]:
    """A control plane without a node, shared by the whole run; use a namespace of your own in it."""
    shared = os.environ.get("MANTHANQUANT_TEST_CLUSTER")
    if shared:
        found = lifecycle.find(shared)
        if not found:
            pytest.fail(f"MANTHANQUANT_TEST_CLUSTER: no cluster {shared!r} is running")
        yield found
        return
    if os.geteuid():
        pytest.skip("the local cluster needs root")
    _remove_clusters_of_dead_runs()
    name = f"test-{os.getpid()}"
    try:
        yield lifecycle.up(name, port=0, nodes=False)
    finally:
        lifecycle.down(name)


@pytest.fixture
def own_plane() -> Iterator[Cluster]:
    """A control plane for one test alone: with no CustomResourceDefinition of ours yet, and no operator."""
    name = "test-own"
    try:
        yield lifecycle.up(name, port=0, nodes=False)
    finally:
        lifecycle.down(name)


@pytest.fixture(scope="session")
def kubeconfig(control_plane: Cluster) -> Path:
    """Path of a cluster-admin kubeconfig for `control_plane`."""
    return control_plane.kubeconfig
