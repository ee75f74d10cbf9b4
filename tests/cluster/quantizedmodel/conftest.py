"""The real operator against a real control plane; see `support.quantizedmodels` for what is played."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from localcluster.lifecycle import Cluster
from support.operator_process import ROOT, OperatorProcess
from support.quantizedmodels import Models, PlayedKubelet, eventually

_numbers = itertools.count(1)  # a namespace takes a while to go, so no name is used twice


@pytest.fixture(scope="session")
def operator(control_plane: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    """The operator, running. A test that kills it starts it again."""
    process = OperatorProcess(control_plane, tmp_path_factory.mktemp("operator"))
    process.install()
    process.start()
    yield process
    if process.process:
        process.stop()


@pytest.fixture
def models(control_plane: Cluster, operator: OperatorProcess, request: pytest.FixtureRequest) -> Iterator[Models]:
    """Models in a namespace of the test's own."""
    words = re.sub(r"[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower()).strip("-")
    name = f"t{next(_numbers)}-{words[:40].strip('-')}"
    control_plane.kubectl("create", "namespace", name)
    eventually(lambda: "default" in control_plane.kubectl("-n", name, "get", "sa", "-o", "name"))
    operator.ensure()
    yield Models(control_plane, name)
    control_plane.kubectl("-n", name, "delete", "qm", "--all", "--wait=false")
    control_plane.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session")
def kubelet(control_plane: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlayedKubelet]:
    folder = tmp_path_factory.mktemp("stats")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = control_plane.in_network(sys.executable, "-m", "support.stats_server", str(folder))
    server = subprocess.Popen(command, env=environment)
    yield PlayedKubelet(control_plane, folder, (f"127.1.{i // 250}.{i % 250 + 1}" for i in range(10_000)))
    server.kill()
    server.wait()
