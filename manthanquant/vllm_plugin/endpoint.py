"""The API process' side of the statistics: a JSON route, gauges in /metrics, and a line on the log.

One task polls the workers; route and gauges show what it last saw, so that scraping costs the engine nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI, HTTPException, Response
from prometheus_client import REGISTRY
from prometheus_client.core import Metric
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from manthanquant import contract, settings, stats
from manthanquant.vllm_plugin import compat

POLL_SECONDS = 2.0
LINE_SECONDS = 30.0
logger = logging.getLogger("vllm.manthanquant")


class StatsEndpoint(Collector):
    """`EndpointPlugin` and Prometheus collector in one: both show the newest `contract.Stats`."""

    name = "manthanquant_stats"
    required_tasks = None

    def __init__(self) -> None:
        self.stats: contract.Stats | None = None
        self._started = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    def attach_router(self, app: FastAPI) -> None:
        @app.get(contract.STATS_PATH)
        async def manthanquant_stats() -> Response:
            if self.stats is None:
                raise HTTPException(503, "no statistics yet: the workers have not been asked")
            return Response(self.stats.to_json(), media_type="application/json")

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        if engine_client is None:  # vLLM's render-only server: there is no cache to speak of
            return
        REGISTRY.register(self)
        self._task = asyncio.create_task(self._poll(engine_client, served_name(args)))

    def collect(self) -> Iterable[Metric]:
        if self.stats is None:
            return
        for sample in stats.samples(self.stats):
            family = CounterMetricFamily if sample.is_counter else GaugeMetricFamily
            yield family(sample.name, sample.help, value=sample.value)

    def describe(self) -> Iterable[Metric]:
        return ()  # names are known only once the workers answered

    async def _poll(self, engine_client: Any, model: str) -> None:
        wanted, written, calls, failing = settings.from_env(), 0.0, 0, False
        while True:
            try:
                answers = await engine_client.collective_rpc("manthanquant_snapshot", timeout=30)
            except Exception as error:  # the engine decides what its death means; here it only ends the figures
                if not failing:
                    logger.warning("statistics stop here: the workers do not answer: %s", error)
                failing = True
                await asyncio.sleep(POLL_SECONDS * 5)
                continue
            failing = False
            self.stats = stats.combine(
                [stats.WorkerSnapshot.from_wire(answer) for answer in answers],
                model=model,
                format=wanted.format,
                mode=wanted.mode,
                uptime_seconds=time.monotonic() - self._started,
                capacity_tokens=compat.capacity_tokens(engine_client.vllm_config),
                load=engine_load(),
            )
            now = time.monotonic()
            if now - written >= LINE_SECONDS and self.stats.writes.calls != calls:
                written, calls = now, self.stats.writes.calls
                logger.info("%s", stats.line(self.stats))
            await asyncio.sleep(POLL_SECONDS)


def stats_endpoint() -> StatsEndpoint:
    """Entry point of `vllm.endpoint_plugins`."""
    return StatsEndpoint()


def served_name(args: Namespace) -> str:
    names = getattr(args, "served_model_name", None)
    return str(names[0] if names else args.model)


_LOAD = {
    "vllm:num_requests_running": ("requests_running", int),
    "vllm:num_requests_waiting": ("requests_waiting", int),
    "vllm:generation_tokens_total": ("generated_tokens", int),
    "vllm:kv_cache_usage_perc": ("kv_usage", float),
    "vllm:num_preemptions_total": ("preemptions", int),
}


def engine_load() -> contract.LoadStats:
    """vLLM's own load figures, from the metrics it exports; summed over engines, usage averaged."""
    found: dict[str, list[float]] = {}
    for family in REGISTRY.collect():
        for sample in family.samples if family.name.startswith("vllm:") else ():
            if sample.name in _LOAD:
                found.setdefault(sample.name, []).append(sample.value)
    values: dict[str, Any] = {}
    for metric, samples in found.items():
        name, kind = _LOAD[metric]
        values[name] = kind(sum(samples) / (len(samples) if kind is float else 1))
    return contract.LoadStats(**values)
