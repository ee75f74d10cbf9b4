"""The whole path on this machine: `make demo`'s own steps, and what must be true after each.

The cluster is called `e2e`, so that a demo that somebody looks at goes on undisturbed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
from e2e import demo, images
from e2e.steps import Steps
from e2e.target import Target, wait_for
from localcluster import lifecycle, paths

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]

NAME = "e2e"
CACHE_BYTES = 2**30  # the demo's kvCache.memory
HERE = f"--namespace={demo.NAMESPACE}"
CHILDREN = "deployments,services,serviceaccounts,poddisruptionbudgets,persistentvolumeclaims,pods"


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    """A cluster with the operator in it and the model on a claim."""
    if os.geteuid():
        pytest.skip("the local cluster needs root")
    lifecycle.down(NAME)
    try:
        started = demo.start_local_cluster(Steps(), NAME)
        demo.install_operator(started)
        demo.put_model_on_claim(started)
        yield started
    finally:
        lifecycle.down(NAME)


@pytest.fixture(scope="module")
def served(target: Target) -> dict[str, Any]:
    """The model, Ready, after it has answered: its status counts that answer."""
    before = demo.serve_model(target)["status"]["kvCache"].get("writes", 0)
    answer = demo.ask(target)
    assert "Paris" in answer
    return demo.wait_until_counted(target, before)


def test_every_condition_is_true_and_says_why(served: dict[str, Any]) -> None:
    conditions = {c["type"]: c for c in served["status"]["conditions"]}
    assert {name for name, c in conditions.items() if c["status"] == "True"} == set(conditions)
    assert {"Planned", "ModelReady", "KernelReady", "WorkloadReady", "TelemetryAvailable", "Ready"} <= set(conditions)
    assert all(c["message"] for c in conditions.values())


def test_the_cache_is_really_compressed(served: dict[str, Any]) -> None:
    """Measured, not estimated: the pages that the engine allocated hold 4.9 times the tokens of its own dtype."""
    cache = served["status"]["kvCache"]
    assert cache["source"] == "Measured"
    assert cache["compressionRatio"] >= 4.9
    assert cache["capacityTokens"] * cache["bytesPerToken"] == pytest.approx(CACHE_BYTES, rel=0.01)
    # The exact tier is on top of the pages; with its bytes counted, the gain is a little smaller.
    assert cache["capacityTokens"] > 4.7 * cache["capacityTokensUncompressed"]
    assert cache["savedBytes"] > 0
    assert cache["vectorsCompressed"] > 0
    assert cache.get("errors", 0) == 0
    assert cache["cosineSimilarity"] > 0.95


def test_the_table_shows_it(target: Target, served: dict[str, Any]) -> None:
    header, row = target.kubectl(HERE, "get", "qm").splitlines()
    columns = dict(zip(re.split(r"\s{2,}", header.strip()), re.split(r"\s{2,}", row.strip()), strict=True))
    assert columns["NAME"] == demo.MODEL
    assert columns["READY"] == "True"
    assert float(columns["RATIO"]) >= 4.9
    assert int(columns["KV-TOKENS"]) == served["status"]["kvCache"]["capacityTokens"]


def test_the_service_answers_by_name_inside_the_cluster(target: Target, served: dict[str, Any]) -> None:
    """Through DNS and the Service's own address, from a pod."""
    script = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1] + '/models').read().decode())"
    command = ("exec", f"deployment/{demo.MODEL}", "--container=server", "--", "python", "-c", script)
    models = json.loads(target.kubectl(HERE, *command, served["status"]["endpoint"]))
    assert [entry["id"] for entry in models["data"]] == [demo.MODEL]


def test_the_pod_is_restricted(target: Target, served: dict[str, Any]) -> None:
    """It runs as user 1000 on a read-only root file system."""
    script = "id -u; touch /opt/probe 2>&1 || true; touch /var/cache/manthanquant/probe && echo cache writable"
    command = ("exec", f"deployment/{demo.MODEL}", "--container=server", "--", "sh", "-c", script)
    lines = target.kubectl(HERE, *command).splitlines()
    assert lines[0] == "1000"
    assert "Read-only file system" in lines[1]
    assert lines[2] == "cache writable"


@pytest.mark.parametrize("image", ["operator", "server-cpu"])
def test_an_image_passes_its_smoke_test(target: Target, image: str) -> None:
    reference = {"operator": target.operator_image, "server-cpu": target.server_image}[image]
    assert "byte-compiled" in images.smoke(reference, image)


def test_the_demo_runs_on_the_current_context(
    target: Target, served: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`CLUSTER=current`, with this cluster as the context: everything is there already and is kept."""
    monkeypatch.setenv("KUBECONFIG", str(target.kubeconfig))
    monkeypatch.setenv("PATH", f"{paths.bin_dir()}:{os.environ['PATH']}")
    monkeypatch.setenv("OPERATOR_IMAGE", target.operator_image)
    monkeypatch.setenv("SERVER_IMAGE", target.server_image)
    demo.run("current", "")
    printed = capsys.readouterr().out
    assert "Paris" in printed
    assert "$ kubectl get qm" in printed


def model(name: str, **spec: Any) -> dict[str, Any]:
    """A QuantizedModel like the demo's, with some sections of its spec replaced."""
    usual = {"model": {"uri": f"pvc://{demo.CLAIM}/{demo.MODEL}"}, "resources": {"accelerator": "cpu"}}
    return {
        "apiVersion": "manthanquant.io/v1alpha1",
        "kind": "QuantizedModel",
        "metadata": {"name": name, "namespace": demo.NAMESPACE},
        "spec": {**usual, **spec},
    }


@pytest.mark.parametrize(
    ("case", "spec", "expected"),
    [
        pytest.param(
            "image",
            {"engine": {"image": "localhost/absent:1", "imagePullPolicy": "IfNotPresent"}},
            r"localhost/absent:1",
            id="image that cannot be pulled",
        ),
        pytest.param(
            "missing", {"model": {"uri": "pvc://models/absent"}}, r"absent", id="model that is not on the claim"
        ),
        pytest.param(
            "oom",
            {"resources": {"accelerator": "cpu", "memory": "64Mi"}},
            r"OOMKilled|out of memory",
            id="container killed for memory",
        ),
        pytest.param(
            "gpu",
            {"resources": {"accelerator": "nvidia.com/gpu"}},
            r"nvidia\.com/gpu",
            id="node without the accelerator",
        ),
    ],
)
def test_a_failure_is_in_ready(target: Target, case: str, spec: dict[str, Any], expected: str) -> None:
    name = f"failing-{case}"
    target.apply(model(name, **spec))

    def explained() -> str | None:
        found = target.get("quantizedmodel", name, HERE)
        ready = [c for c in found.get("status", {}).get("conditions", []) if c["type"] == "Ready"]
        message = ready[0].get("message", "") if ready else ""
        return message if ready and ready[0]["status"] == "False" and re.search(expected, message) else None

    try:
        assert wait_for(f"{expected!r} in the message of Ready", 180, explained)
    finally:
        target.kubectl(HERE, "delete", "quantizedmodel", name, "--wait=false")


def test_a_deleted_model_takes_its_children_along(target: Target, served: dict[str, Any]) -> None:
    def children() -> list[str]:
        names = target.kubectl(HERE, "get", CHILDREN, "--output=name", f"--selector=manthanquant.io/model={demo.MODEL}")
        return names.split()

    assert len(children()) >= 4
    target.kubectl(HERE, "delete", "quantizedmodel", demo.MODEL)
    wait_for("the removal of the children", 180, lambda: not children())
    assert target.get("persistentvolumeclaim", demo.CLAIM, HERE)  # the user's own claim stays
