"""One model through a faulty API server: nothing is written twice, and a fault in the middle is made good.

Everything else of reconciliation is tested against a real API server, in `tests/cluster`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from manthanquant_operator import cluster as cluster_module
from manthanquant_operator import facts
from manthanquant_operator.cluster import ApiError, Cluster
from manthanquant_operator.facts import ChildFacts, Key, PodFacts
from manthanquant_operator.reconcile import CONFLICT_SECONDS, Reconciler
from manthanquant_operator.scraper import Scraper
from manthanquant_operator.settings import Settings, Telemetry
from support.faulty_api import Fault, FaultyApi, with_faulty_api

KEY = ("ml", "qwen")
PATH = "/apis/manthanquant.io/v1alpha1/namespaces/ml/quantizedmodels/qwen"
SERVICE = "/api/v1/namespaces/ml/services/qwen"


class Nothing:
    """The watches of a cluster without pods and children."""

    def pods(self, key: Key) -> list[PodFacts]:
        return []

    def children(self, key: Key) -> list[ChildFacts]:
        return []


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "FIRST_BACKOFF_SECONDS", 0.0)


@pytest.fixture
def api() -> FaultyApi:
    metadata = {"name": "qwen", "namespace": "ml", "uid": "uid-1", "generation": 1}
    return FaultyApi({PATH: {"metadata": metadata, "spec": {"model": {"uri": "hf://a/b"}}}})


def _run(api: FaultyApi, settings: Settings, use: Callable[[Reconciler], Awaitable[None]]) -> None:
    async def with_cluster(cluster: Cluster) -> None:
        await use(Reconciler(cluster, Nothing(), Scraper(Telemetry()), settings, lambda: "2026-01-01T00:00:00Z"))

    asyncio.run(with_faulty_api(api, with_cluster))


def _writes(api: FaultyApi) -> list[str]:
    return [path.split("?")[0] for method, path, _ in api.requests if method != "GET"]


def test_a_second_look_writes_nothing(api: FaultyApi, settings: Settings) -> None:
    async def use(reconciler: Reconciler) -> None:
        assert await reconciler.reconcile(KEY) is None
        first = len(_writes(api))
        assert await reconciler.reconcile(KEY) is None
        assert len(_writes(api)) == first

    _run(api, settings, use)
    written = _writes(api)
    assert written[:4] == [
        "/api/v1/namespaces/ml/serviceaccounts/qwen",
        SERVICE,
        "/apis/policy/v1/namespaces/ml/poddisruptionbudgets/qwen",
        "/apis/apps/v1/namespaces/ml/deployments/qwen",
    ]
    assert written[4] == f"{PATH}/status"


def test_a_new_operator_applies_once_more_and_changes_no_status(api: FaultyApi, settings: Settings) -> None:
    async def use(reconciler: Reconciler) -> None:
        await reconciler.reconcile(KEY)

    _run(api, settings, use)
    for obj in api.objects.values():  # as the API server would keep them
        obj.setdefault("metadata", {}).setdefault("ownerReferences", [{"uid": "uid-1", "controller": True}])
    api.requests.clear()
    _run(api, settings, use)
    assert f"{PATH}/status" not in _writes(api) and len(_writes(api)) == 4


def test_a_fault_in_the_middle_is_raised_and_the_next_look_goes_on(api: FaultyApi, settings: Settings) -> None:
    async def use(reconciler: Reconciler) -> None:
        api.faults = [Fault(503)] * cluster_module.ATTEMPTS
        with pytest.raises(ApiError):
            await reconciler.reconcile(KEY)
        assert _writes(api) == []
        await reconciler.reconcile(KEY)
        assert len(set(_writes(api))) >= 5

    _run(api, settings, use)


def test_a_refused_child_becomes_a_condition_and_is_tried_again(api: FaultyApi, settings: Settings) -> None:
    async def use(reconciler: Reconciler) -> None:
        await reconciler.reconcile(KEY)
        del api.objects[SERVICE]
        service = facts.child("Service", {"metadata": {"name": "qwen", "namespace": "ml", "uid": "x"}})
        reconciler.child_changed(KEY, service, deleted=True)
        ok = Fault(
            200, body='{"metadata":{"name":"qwen","namespace":"ml","uid":"uid-1"},"spec":{"model":{"uri":"hf://a/b"}}}'
        )
        api.faults = [ok, Fault(404), Fault(422)]
        with pytest.raises(ApiError, match="422"):
            await reconciler.reconcile(KEY)

    _run(api, settings, use)
    status = api.objects[PATH]["status"]
    planned = next(c for c in status["conditions"] if c["type"] == "Planned")
    assert (planned["status"], planned["reason"]) == ("False", "ApplyFailed")
    assert "services/qwen: 422 made to fail" in planned["message"]


def test_somebody_elses_object_is_not_touched(api: FaultyApi, settings: Settings) -> None:
    api.objects[SERVICE] = {"metadata": {"name": "qwen", "ownerReferences": [{"kind": "App", "name": "a", "uid": "z"}]}}

    async def use(reconciler: Reconciler) -> None:
        assert await reconciler.reconcile(KEY) == CONFLICT_SECONDS

    _run(api, settings, use)
    assert SERVICE not in _writes(api)
    ready = next(c for c in api.objects[PATH]["status"]["conditions"] if c["type"] == "Ready")
    assert ready["reason"] == "NameConflict" and "Service qwen exists and belongs to App a" in ready["message"]


def test_a_spec_of_another_schema_names_its_field(api: FaultyApi, settings: Settings) -> None:
    api.objects[PATH]["spec"] = {"model": {"uri": "hf://a/b"}, "replicas": "many"}

    async def use(reconciler: Reconciler) -> None:
        assert await reconciler.reconcile(KEY) is None

    _run(api, settings, use)
    planned = api.objects[PATH]["status"]["conditions"][0]
    assert planned["reason"] == "InvalidSpec" and planned["message"].startswith("spec.replicas: 'many': ")
    assert _writes(api)[0] == f"{PATH}/status"


@pytest.mark.parametrize("gone", [None, "2026-01-01T00:00:00Z"])
def test_a_model_that_goes_is_left_to_the_garbage_collector(
    gone: str | None, api: FaultyApi, settings: Settings
) -> None:
    if gone:
        api.objects[PATH]["metadata"]["deletionTimestamp"] = gone
    else:
        del api.objects[PATH]

    async def use(reconciler: Reconciler) -> None:
        assert await reconciler.reconcile(KEY) is None

    _run(api, settings, use)
    assert _writes(api) == []


def test_a_model_deleted_before_its_status_is_written_is_no_error(api: FaultyApi, settings: Settings) -> None:
    body: dict[str, Any] = api.objects[PATH]
    body["spec"] = {"model": {"uri": "s3://a/b"}}

    async def use(reconciler: Reconciler) -> None:
        api.faults = []
        original = api.handle

        async def handle(request: Any) -> Any:
            if request.method == "PATCH":
                api.faults = [Fault(404)]
            return await original(request)

        api.handle = handle  # type: ignore[method-assign]
        assert await reconciler.reconcile(KEY) is None

    _run(api, settings, use)


def test_an_own_change_seen_by_the_watch_is_no_drift(api: FaultyApi, settings: Settings) -> None:
    async def use(reconciler: Reconciler) -> None:
        await reconciler.reconcile(KEY)
        count = len(_writes(api))
        seen = facts.child("Service", api.objects[SERVICE])
        reconciler.child_changed(KEY, seen, deleted=False)
        await reconciler.reconcile(KEY)
        assert len(_writes(api)) == count

    _run(api, settings, use)
