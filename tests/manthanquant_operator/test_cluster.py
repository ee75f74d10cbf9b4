"""Faults of the API server: what is tried again, what is not, and what the error says."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import unquote

import pytest
from kubernetes.aio.client import ApiClient, Configuration
from manthanquant_operator import cluster
from manthanquant_operator.children import KINDS
from manthanquant_operator.cluster import ApiError, Cluster
from support.faulty_api import Fault, FaultyApi, with_faulty_api

KEY = ("ml", "qwen")
MODEL = "/apis/manthanquant.io/v1alpha1/namespaces/ml/quantizedmodels/qwen"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits, without the waiting."""
    waits: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(cluster.asyncio, "sleep", note)
    return waits


def _run(api: FaultyApi, use: Any) -> None:
    asyncio.run(with_faulty_api(api, use))


@pytest.mark.parametrize("fault", [Fault(429), Fault(500), Fault(503), Fault(0)])
def test_a_passing_fault_is_tried_again(fault: Fault) -> None:
    api = FaultyApi({MODEL: {"metadata": {"name": "qwen"}}}, [fault, fault])

    async def use(cluster: Cluster) -> None:
        assert await cluster.model(KEY) == {"metadata": {"name": "qwen"}}

    _run(api, use)
    assert len(api.requests) == 3


@pytest.mark.parametrize(("values", "largest"), [(("16384", "81559"), 81559), (("unknown",), None), ((), None)])
def test_the_largest_number_in_a_label(values: tuple[str, ...], largest: int | None) -> None:
    items = [{"metadata": {"labels": {"nvidia.com/gpu.memory": value}}} for value in values]
    api = FaultyApi({"/api/v1/nodes": {"items": items or None}})

    async def use(cluster: Cluster) -> None:
        assert await cluster.largest_label("nvidia.com/gpu.memory", {"pool": "gpu"}) == largest

    _run(api, use)
    ((_, path, _),) = api.requests
    assert unquote(path).endswith("?labelSelector=nvidia.com/gpu.memory,pool=gpu")


def test_retries_are_bounded_and_the_last_error_is_raised() -> None:
    api = FaultyApi(faults=[Fault(503)] * 100)

    async def use(cluster: Cluster) -> None:
        with pytest.raises(ApiError, match="503 made to fail") as caught:
            await cluster.model(KEY)
        assert caught.value.transient

    _run(api, use)
    assert len(api.requests) == cluster.ATTEMPTS


def test_retry_after_is_obeyed_up_to_a_bound(short_waits: list[float]) -> None:
    api = FaultyApi({MODEL: {}}, [Fault(429, {"Retry-After": "7"}), Fault(429, {"Retry-After": "9999"})])

    async def use(cluster: Cluster) -> None:
        await cluster.model(KEY)

    _run(api, use)
    assert [wait for wait in short_waits if wait >= 1] == [7.0, cluster.MAX_BACKOFF_SECONDS]


@pytest.mark.parametrize("status", [403, 409, 422])
def test_a_refusal_is_not_tried_again_and_carries_the_servers_words(status: int) -> None:
    api = FaultyApi(faults=[Fault(status)])
    obj = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "qwen", "namespace": "ml"}}

    async def use(cluster: Cluster) -> None:
        with pytest.raises(
            ApiError, match=f"PATCH /api/v1/namespaces/ml/services/qwen: {status} made to fail"
        ) as caught:
            await cluster.apply(obj)
        assert not caught.value.transient and caught.value.reason == "Fault"

    _run(api, use)
    assert len(api.requests) == 1


def test_an_answer_that_is_not_json_is_an_error_with_its_text() -> None:
    api = FaultyApi(faults=[Fault(403, body="<html>proxy</html>")])

    async def use(cluster: Cluster) -> None:
        with pytest.raises(ApiError, match="<html>proxy</html>"):
            await cluster.model(KEY)

    _run(api, use)


def test_a_missing_object_is_none() -> None:
    async def use(cluster: Cluster) -> None:
        assert await cluster.model(KEY) is None
        assert await cluster.child(KINDS["Deployment"], "ml", "qwen") is None
        assert not await cluster.serves_models()

    _run(FaultyApi(), use)


def test_an_event_whose_answer_was_lost_is_not_posted_twice_and_fails_nobody() -> None:
    api = FaultyApi(faults=[Fault(0)])

    async def use(cluster: Cluster) -> None:
        await cluster.event({"metadata": {"name": "qwen", "namespace": "ml", "uid": "u"}}, "Normal", "R", "m", "t")

    _run(api, use)
    assert api.methods() == ["POST"]


@pytest.mark.parametrize("status", [404, 409])
def test_deleting_what_is_gone_or_made_anew_is_fine(status: int) -> None:
    api = FaultyApi(faults=[Fault(status)])

    async def use(cluster: Cluster) -> None:
        await cluster.delete(KINDS["Job"], "ml", "qwen-plan", "uid-1")

    _run(api, use)
    method, path, body = api.requests[0]
    assert (method, path) == ("DELETE", "/apis/batch/v1/namespaces/ml/jobs/qwen-plan")
    assert body["preconditions"] == {"uid": "uid-1"} and body["propagationPolicy"] == "Background"


def test_an_unreachable_server_is_a_transient_error() -> None:
    async def use() -> None:
        async with ApiClient(Configuration(host="http://127.0.0.1:1")) as client:
            with pytest.raises(ApiError) as caught:
                await Cluster(client, "test").model(KEY)
            assert caught.value.status == 0 and caught.value.transient

    asyncio.run(use())


def test_the_newest_warning_is_found() -> None:
    old = {"metadata": {}, "reason": "Old", "message": "o", "lastTimestamp": "2026-01-01T00:00:00Z"}
    new = {"metadata": {}, "reason": "New", "message": "n", "eventTime": "2026-01-02T00:00:00Z"}
    api = FaultyApi({"/api/v1/namespaces/ml/events": {"items": [new, old]}})

    async def use(cluster: Cluster) -> None:
        assert await cluster.pod_warning("ml", "u") == ("New", "n")
        api.objects["/api/v1/namespaces/ml/events"] = {"items": []}
        assert await cluster.pod_warning("ml", "u") is None

    _run(api, use)
    assert "fieldSelector=involvedObject.uid%3Du,type%3DWarning" in api.requests[0][1]
