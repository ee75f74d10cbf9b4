"""An operator with rights in one namespace only."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from localcluster.lifecycle import Cluster
from support.operator_process import VALUES, OperatorProcess
from support.quantizedmodels import Models, eventually

pytestmark = pytest.mark.cluster
SPEC = {"model": {"uri": "hf://a/b"}, "resources": {"accelerator": "cpu"}}


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
