"""Leadership: who may take it, when it is given up, and that two at once end as one."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from manthanquant_operator import lease
from manthanquant_operator.cluster import Cluster
from manthanquant_operator.lease import Lease
from manthanquant_operator.settings import LeaderElection
from support.faulty_api import Fault, FaultyApi, with_faulty_api

PATH = "/apis/coordination.k8s.io/v1/namespaces/default/leases/manthanquant-operator"
SETTINGS = LeaderElection(lease_seconds=3)


def _held(by: str, version: str = "1") -> dict[str, Any]:
    return {
        "metadata": {"name": "manthanquant-operator", "namespace": "default", "resourceVersion": version},
        "spec": {"holderIdentity": by, "leaseDurationSeconds": 3, "leaseTransitions": 1},
    }


def _candidate(cluster: Cluster) -> Lease:
    return Lease(cluster, SETTINGS, "me")


def _run(api: FaultyApi, use: Any) -> None:
    asyncio.run(with_faulty_api(api, use))


@pytest.mark.parametrize("held", [None, _held(""), _held("me")])
def test_a_free_lease_or_ones_own_is_taken(held: dict[str, Any] | None) -> None:
    api = FaultyApi({PATH: held} if held else {})

    async def use(cluster: Cluster) -> None:
        assert await _candidate(cluster)._try()

    _run(api, use)
    method, _, body = api.requests[-1]
    assert method == ("PUT" if held else "POST")
    assert body["spec"]["holderIdentity"] == "me" and body["spec"]["renewTime"].endswith("Z")


def test_another_holders_lease_is_taken_only_once_it_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(lease.time, "monotonic", lambda: clock[0])
    api = FaultyApi({PATH: _held("other")})

    async def use(cluster: Cluster) -> None:
        candidate = _candidate(cluster)
        assert not await candidate._take()
        clock[0] += 2.9
        assert not await candidate._take()
        api.objects[PATH] = _held("other", "2")  # it was renewed: the wait starts again
        clock[0] += 0.2
        assert not await candidate._take()
        clock[0] += 3.1
        assert await candidate._take()

    _run(api, use)
    assert api.objects[PATH]["spec"]["leaseTransitions"] == 2


def test_of_two_at_once_the_slower_one_gives_way() -> None:
    held = _held("")
    api = FaultyApi(faults=[Fault(200, body=json.dumps(held)), Fault(409)])

    async def use(cluster: Cluster) -> None:
        assert not await _candidate(cluster)._try()

    _run(api, use)
    assert api.methods() == ["GET", "PUT"]
    assert api.requests[1][2]["metadata"]["resourceVersion"] == "1"


def test_leadership_ends_when_it_cannot_be_renewed() -> None:
    api = FaultyApi({PATH: _held("")})
    led = []

    async def use(cluster: Cluster) -> None:
        def lead() -> None:
            led.append(True)
            api.faults = [Fault(403)] * 1000

        await asyncio.wait_for(_candidate(cluster).hold(lead), SETTINGS.lease_seconds)

    _run(api, use)
    assert led == [True]


def test_release_frees_ones_own_lease_and_no_other() -> None:
    for holder, expected in (("me", ""), ("other", "other")):
        api = FaultyApi({PATH: _held(holder)})

        async def use(cluster: Cluster) -> None:
            await _candidate(cluster).release()

        _run(api, use)
        assert api.objects[PATH]["spec"]["holderIdentity"] == expected


def test_a_release_that_fails_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def use(cluster: Cluster) -> None:
        await _candidate(cluster).release()

    _run(FaultyApi(faults=[Fault(403)]), use)
    assert "was not released" in caplog.text
