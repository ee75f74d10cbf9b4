"""Statistics over HTTP: good ones, bad ones, and pods that go."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web
from manthanquant_operator import scraper
from manthanquant_operator.facts import PodFacts
from manthanquant_operator.scraper import Scraper
from manthanquant_operator.settings import Telemetry

from manthanquant.contract import STATS_PATH, CacheReport, CalibrationReport, KernelReport, Stats

STATS = Stats("m", KernelReport("torch"), CalibrationReport("hadamard", "Off"), CacheReport("k42v3", "compressed"))
POD = PodFacts("p", "u", "server", "", "n", "127.0.0.1", "Running", "", "", True, False, "", (), ())


def _run(
    answer: Callable[[], web.Response],
    use: Callable[[Scraper, aiohttp.ClientSession], Awaitable[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        async def handle(request: web.Request) -> web.Response:
            assert request.path == STATS_PATH
            return answer()

        app = web.Application()
        app.router.add_route("GET", "/{path:.*}", handle)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        monkeypatch.setattr(scraper, "HTTP_PORT", runner.addresses[0][1])
        try:
            async with aiohttp.ClientSession() as session:
                await use(Scraper(Telemetry(timeout_seconds=0.5)), session)
        finally:
            await runner.cleanup()

    asyncio.run(main())


def test_good_statistics_are_kept_and_a_pod_that_goes_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(scraper: Scraper, session: aiohttp.ClientSession) -> None:
        await scraper.scrape(session, [POD])
        assert scraper.samples["u"].stats == STATS and scraper.errors == {}
        await scraper.scrape(session, [])
        assert scraper.samples == {}

    _run(lambda: web.Response(text=STATS.to_json()), use, monkeypatch)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (web.Response(status=503), "503"),
        (web.Response(text="<html>"), "not JSON"),
        (web.Response(text='{"schema":1}'), "Stats.model: missing"),
        (web.Response(body=b"\xff\xfe\xff", content_type="text/plain", charset="utf-8"), "codec can't decode"),
    ],
)
def test_bad_answers_are_errors_that_say_what_was_found(
    answer: web.Response, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(scraper: Scraper, session: aiohttp.ClientSession) -> None:
        await scraper.scrape(session, [POD])
        assert words in scraper.errors["u"] and scraper.samples == {}

    _run(lambda: answer, use, monkeypatch)


def test_an_error_keeps_the_last_sample_and_a_success_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([web.Response(text=STATS.to_json()), web.Response(status=500), web.Response(text=STATS.to_json())])

    async def use(scraper: Scraper, session: aiohttp.ClientSession) -> None:
        await scraper.scrape(session, [POD])
        await scraper.scrape(session, [POD])
        assert "500" in scraper.errors["u"] and "u" in scraper.samples
        await scraper.scrape(session, [POD])
        assert scraper.errors == {}

    _run(lambda: next(answers), use, monkeypatch)


def test_a_server_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(scraper: Scraper, session: aiohttp.ClientSession) -> None:
        await scraper.scrape(session, [dataclasses.replace(POD, ip="127.0.0.9")])
        assert scraper.errors["u"]

    _run(lambda: web.Response(), use, monkeypatch)


def test_ipv6_addresses_are_bracketed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(scraper: Scraper, session: aiohttp.ClientSession) -> None:
        await scraper.scrape(session, [dataclasses.replace(POD, ip="::1")])
        assert "[::1]" in scraper.errors["u"] or "::1" in scraper.errors["u"]

    _run(lambda: web.Response(), use, monkeypatch)
