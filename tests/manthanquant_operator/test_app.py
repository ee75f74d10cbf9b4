"""The process: its health, and how it ends."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from manthanquant_operator import app
from manthanquant_operator.app import App, OperatorStopped
from manthanquant_operator.children import KINDS, POD
from manthanquant_operator.facts import ChildFacts
from manthanquant_operator.settings import LeaderElection, Settings
from support.faulty_api import FaultyApi, with_faulty_api

NO_LEASE = Settings(leader_election=LeaderElection(enabled=False))


def _with_app(use: Any, settings: Settings = NO_LEASE, api: FaultyApi | None = None) -> None:
    async def main(cluster: Any) -> None:
        await use(App(settings, cluster, "me"))

    asyncio.run(with_faulty_api(api or FaultyApi(), main))


def test_without_the_definition_it_does_not_start() -> None:
    async def use(made: App) -> None:
        with pytest.raises(OperatorStopped, match="apply crds/ first"):
            await made.run()

    _with_app(use)


def test_a_healthy_operator_tells_its_ages(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(made: App) -> None:
        assert made.probe().keys() == {"resync", "reconciliation"}  # telemetry waits for the Lease
        made._leading.set()
        assert made.probe().keys() == {"resync", "reconciliation", "telemetry"}

    _with_app(use)


@pytest.mark.parametrize("part", ["resync", "telemetry"])
def test_a_stuck_loop_is_unhealthy(part: str) -> None:
    async def use(made: App) -> None:
        made._leading.set()
        made._seen_alive[part] -= 10_000
        with pytest.raises(OperatorStopped, match=f"{part} has been stuck for 1"):
            made.probe()

    _with_app(use)


def test_a_stuck_reconciliation_is_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(made: App) -> None:
        monkeypatch.setattr(made._queue, "oldest_active_seconds", lambda: app.STUCK_SECONDS + 1)
        with pytest.raises(OperatorStopped, match="reconciliation has been stuck"):
            made.probe()

    _with_app(use)


def test_what_a_watch_missed_is_made_good_by_a_list() -> None:
    """A deletion that no watch told: the object is forgotten, and its model looked at, with every other model."""
    key, gone, kept = ("ml", "qwen"), ChildFacts("Service", "qwen", "gone", "", ""), SimpleNamespace(uid="kept")
    api = FaultyApi()
    for kind in (POD, *KINDS.values()):
        base = f"/apis/{kind.group_version}" if kind.group else f"/api/{kind.version}"
        api.objects[f"{base}/{kind.plural}"] = {"items": [{"metadata": {"uid": "kept"}}]}
    api.objects["/apis/batch/v1/jobs"] = {"items": None}  # as the API server says that there are none
    models = [{"metadata": {"namespace": "ml", "name": "other"}}]
    api.objects["/apis/manthanquant.io/v1alpha1/quantizedmodels"] = {"items": models}

    async def use(made: App) -> None:
        indices: dict[str, Any] = {f"{kind.plural}_of_models": {} for kind in KINDS.values()}
        made._watches.bind({**indices, "pods": {key: [kept]}, "services_of_models": {key: [gone]}})
        await made.look_again()
        assert made._watches.pods(key) == [kept] and made._watches.children(key) == []
        assert made._queue._queued == {key, ("ml", "other")}

    _with_app(use, api=api)
    assert {method for method in api.methods()} == {"GET"}
    assert all(
        "labelSelector=manthanquant.io/model" in path or "quantizedmodels" in path for _, path, _ in api.requests
    )


def test_the_time_is_written_as_kubernetes_does() -> None:
    assert len(app.now()) == len("2026-01-01T00:00:00Z") and app.now().endswith("Z")
