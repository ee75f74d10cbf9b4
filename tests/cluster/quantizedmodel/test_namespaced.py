"""An operator with rights in one namespace only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from localcluster import lifecycle
from localcluster.lifecycle import Cluster
from support.operator_process import VALUES, OperatorProcess
from support.quantizedmodels import Models, eventually

pytestmark = pytest.mark.cluster
SPEC = {"model": {"uri": "hf://a/b"}, "resources": {"accelerator": "cpu"}}


@pytest.fixture
def own_plane() -> Iterator[Cluster]:
    """A control plane without the cluster-wide operator of the other tests."""
    name = "test-namespaced"
    try:
        yield lifecycle.up(name, port=0, nodes=False)
    finally:
        lifecycle.down(name)


def test_only_the_named_namespace_is_served(own_plane: Cluster, tmp_path: Path) -> None:
    own_plane.kubectl("create", "namespace", "mine")
    own_plane.kubectl("create", "namespace", "other")
    operator = OperatorProcess(own_plane, tmp_path, values=(*VALUES, "watchNamespaces={mine}", "rbac.aggregate=false"))
    operator.install()
    operator.start()
    try:
        mine, other = Models(own_plane, "mine"), Models(own_plane, "other")
        other.create("m", SPEC)
        mine.create("m", SPEC)
        mine.wait("m", "Planned", status="True")
        eventually(lambda: "Deployment" in mine.children("m"))
        time.sleep(3)
        assert other.children("m") == {} and "status" not in other.get("m")
    finally:
        operator.kill()
