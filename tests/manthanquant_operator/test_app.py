"""The process: its health, and how it ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from manthanquant_operator import app
from manthanquant_operator.app import App, OperatorStopped
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


def test_the_time_is_written_as_kubernetes_does() -> None:
    assert len(app.now()) == len("2026-01-01T00:00:00Z") and app.now().endswith("Z")
