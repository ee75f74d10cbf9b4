"""Bad specs are refused by the real API server, or answered by a condition: always the field and the remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from localcluster.api import ApiError
from localcluster.lifecycle import Cluster, ClusterError
from support.operator_process import OperatorProcess
from support.quantizedmodels import Models

pytestmark = pytest.mark.cluster
CASES: list[dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parents[2] / "manthanquant_operator/bad_specs.yaml").read_text()
)
REFUSED = [case for case in CASES if "refused" in case]
ANSWERED = [case for case in CASES if "condition" in case]


def test_there_are_enough_cases_and_each_has_one_answer() -> None:
    assert len(CASES) >= 30
    assert all(("refused" in case) != ("condition" in case) for case in CASES)
    assert len({case["name"] for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case["name"])
def test_the_api_server_refuses(case: dict[str, Any], control_plane: Cluster, operator: OperatorProcess) -> None:
    models = Models(control_plane, "default")
    with pytest.raises(ApiError) as caught:
        models.create("bad", case["spec"])
    assert caught.value.status in (400, 422)
    assert re.search(case["refused"], _message(caught.value)), str(caught.value)


@pytest.mark.parametrize("case", ANSWERED, ids=lambda case: case["name"])
def test_a_condition_answers(case: dict[str, Any], models: Models) -> None:
    models.create("bad", case["spec"])
    for kind in ("Planned", "Ready"):
        models.wait("bad", kind, 10, status="False", message=case["condition"])
    assert models.children("bad") == {}


def test_names_are_those_of_services(models: Models) -> None:
    for name in ("1model", "a.b", "m" * 51):
        with pytest.raises(ApiError, match=r"metadata.name names a Service"):
            models.create(name, {"model": {"uri": "hf://a/b"}})
    models.create("m" * 50, {"model": {"uri": "hf://a/b"}})


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            {"model": {"uri": "hf://a/b", "cache": {"size": "1Gi"}}},
            {"model": {"uri": "hf://a/c"}},
            "uri cannot be changed while the model has a cache of its own: make a new QuantizedModel",
        ),
        (
            {"model": {"uri": "hf://a/b"}, "kernelCache": {"persistentVolumeClaim": {"size": "1Gi"}}},
            {"kernelCache": {"persistentVolumeClaim": {"size": "2Gi"}}},
            "size cannot be changed: resize the PersistentVolumeClaim itself",
        ),
    ],
)
def test_changes_that_cannot_be_made(before: dict[str, Any], after: dict[str, Any], words: str, models: Models) -> None:
    models.create("m", before)
    with pytest.raises(ClusterError, match=words):
        models.patch("m", {"spec": after})


def test_a_uri_without_a_cache_may_change(models: Models) -> None:
    models.create("m", {"model": {"uri": "hf://a/b"}})
    models.patch("m", {"spec": {"model": {"uri": "hf://a/c"}}})
    assert models.get("m")["spec"]["model"]["uri"] == "hf://a/c"


def test_unknown_fields_are_refused_by_kubectl(models: Models) -> None:
    manifest = {
        "apiVersion": "manthanquant.io/v1alpha1",
        "kind": "QuantizedModel",
        "metadata": {"name": "m"},
        "spec": {"model": {"uri": "hf://a/b"}, "kvcache": {}},
    }
    with pytest.raises(ClusterError, match=r'unknown field "spec\.kvcache"'):
        models.cluster.kubectl("-n", models.namespace, "apply", "-f", "-", stdin=yaml.safe_dump(manifest))


def _message(error: ApiError) -> str:
    """The API server's message: its answer is cut, so it need not be whole JSON."""
    return str(error).replace('\\"', '"').replace("\\u003e", ">").replace("\\u003c", "<")
