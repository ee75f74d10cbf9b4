"""Reads the servers' statistics over HTTP, from the pods' own addresses."""

from __future__ import annotations

import asyncio
import time

import aiohttp

from manthanquant.contract import HTTP_PORT, STATS_PATH, ContractError, Stats

from .facts import PodFacts
from .settings import Telemetry
from .telemetry import Sample, sample


class Scraper:
    """The newest sample of each ready server, and why the newest read failed where it did. Keyed by pod UID."""

    def __init__(self, settings: Telemetry) -> None:
        self.samples: dict[str, Sample] = {}
        self.errors: dict[str, str] = {}
        self._settings = settings
        self._limit = asyncio.Semaphore(settings.concurrency)

    async def scrape(self, session: aiohttp.ClientSession, pods: list[PodFacts]) -> None:
        """Reads every pod's statistics once, and forgets pods that are not listed."""
        listed = {pod.uid for pod in pods}
        self.samples = {uid: value for uid, value in self.samples.items() if uid in listed}
        self.errors = {uid: value for uid, value in self.errors.items() if uid in listed}
        await asyncio.gather(*(self._scrape_pod(session, pod) for pod in pods))

    async def _scrape_pod(self, session: aiohttp.ClientSession, pod: PodFacts) -> None:
        try:
            stats = await self._read(session, pod)
        except (aiohttp.ClientError, TimeoutError, OSError, ContractError, UnicodeDecodeError) as error:
            self.errors[pod.uid] = str(error) or type(error).__name__
            return
        self.errors.pop(pod.uid, None)
        self.samples[pod.uid] = sample(pod.name, stats, time.monotonic(), self.samples.get(pod.uid))

    async def _read(self, session: aiohttp.ClientSession, pod: PodFacts) -> Stats:
        host = f"[{pod.ip}]" if ":" in pod.ip else pod.ip
        timeout = aiohttp.ClientTimeout(total=self._settings.timeout_seconds)
        async with self._limit, session.get(f"http://{host}:{HTTP_PORT}{STATS_PATH}", timeout=timeout) as response:
            response.raise_for_status()
            return Stats.from_json(await response.text())
