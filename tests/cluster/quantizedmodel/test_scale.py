"""Two hundred models: all are served, then nothing is written, and the operator stays small."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import yaml
from support.operator_process import OperatorProcess
from support.quantizedmodels import Models, PlayedKubelet, eventually

pytestmark = pytest.mark.cluster
COUNT = 200
QUIET_SECONDS = 30  # with a reading of all statistics each second, and a resync every ten
MAX_RSS_MIB = 150


@pytest.mark.timeout(900)
def test_two_hundred_models(models: Models, kubelet: PlayedKubelet, operator: OperatorProcess) -> None:
    spec = {"model": {"uri": "hf://a/b"}, "resources": {"accelerator": "cpu"}}
    manifests = [
        {
            "apiVersion": "manthanquant.io/v1alpha1",
            "kind": "QuantizedModel",
            "metadata": {"name": f"m{i:03}"},
            "spec": spec,
        }
        for i in range(COUNT)
    ]
    start = time.monotonic()
    models.cluster.kubectl("-n", models.namespace, "create", "-f", "-", stdin=yaml.safe_dump_all(manifests))

    def deployments() -> list[Any]:
        return models.cluster.api.get(f"/apis/apps/v1/namespaces/{models.namespace}/deployments")["items"]

    eventually(lambda: len(deployments()) == COUNT, 300, lambda: len(deployments()))
    seconds = time.monotonic() - start
    pods = f"/api/v1/namespaces/{models.namespace}/pods"
    eventually(lambda: len(models.cluster.api.get(pods)["items"]) == COUNT, 120)
    for pod in models.cluster.api.get(pods)["items"]:
        kubelet.ready(pod)

    def serving() -> int:
        path = f"/apis/manthanquant.io/v1alpha1/namespaces/{models.namespace}/quantizedmodels"
        return json.dumps(models.cluster.api.get(path)).count('"reason": "Serving"')

    eventually(lambda: serving() == COUNT, 300, serving)
    operator.settle(quiet=5, timeout=120)
    before = len(operator.writes())
    time.sleep(QUIET_SECONDS)
    assert len(operator.writes()) == before, operator.writes()[before:][:5]
    assert "resync put off" not in operator.log
    rss = operator.rss_mib()
    print(
        f"{COUNT} models: every Deployment after {seconds:.0f} s, {before} writes in all, then none; RSS {rss:.1f} MiB"
    )
    assert rss <= MAX_RSS_MIB
