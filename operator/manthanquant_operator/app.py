"""The operator's process: the watches, the workers behind a Lease, the telemetry, and the health probe."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

import aiohttp
import kopf
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import KUBE_CONFIG_DEFAULT_LOCATION, load_incluster_config, load_kube_config

from . import handlers, telemetry
from .children import KINDS, POD
from .cluster import ApiError, Cluster
from .facts import ChildFacts, Key, PodFacts
from .handlers import Watches
from .lease import Lease
from .reconcile import Reconciler
from .scraper import Scraper
from .settings import Settings
from .workqueue import WorkQueue

logger = logging.getLogger(__name__)

STUCK_SECONDS = 300.0
FIRST_RATE_SECONDS = 1.0
NEW_POD_SECONDS = 1.0  # servers that become ready together are read together


class OperatorStopped(RuntimeError):
    """The operator cannot go on; its pod is restarted."""


class App:
    """One operator process."""

    def __init__(self, settings: Settings, cluster: Cluster, identity: str) -> None:
        self._settings = settings
        self._cluster = cluster
        self._identity = identity
        self._lease = Lease(cluster, settings.leader_election, identity)
        self._watches = Watches()
        self._queue = WorkQueue()
        self._scraper = Scraper(settings.telemetry)
        self._reconciler = Reconciler(cluster, self._watches, self._scraper, settings, now)
        self._leading = asyncio.Event()
        self._scraped = asyncio.Event()  # the servers' figures are known, as far as they can be
        self._new_pod = asyncio.Event()
        self._seen_alive = {"resync": time.monotonic(), "telemetry": time.monotonic()}

    async def run(self) -> None:
        """Runs until the process is asked to stop. Raises `OperatorStopped` when a part of it ended by itself."""
        if not await self._cluster.serves_models():
            raise OperatorStopped("the QuantizedModel CustomResourceDefinition is not installed: apply crds/ first")
        parts = [self._election(), self._resync(), self._telemetry()]
        parts += [self._worker() for _ in range(self._settings.workers)]
        tasks = [asyncio.create_task(part) for part in parts]
        watches = asyncio.create_task(self._watch())
        try:
            done, _ = await asyncio.wait([watches, *tasks], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (watches, *tasks):
                task.cancel()
            await asyncio.gather(watches, *tasks, return_exceptions=True)
            if self._settings.leader_election.enabled:
                await self._lease.release()
        for task in done:
            error = task.exception()
            if isinstance(error, OperatorStopped):
                raise error
            if error:
                raise OperatorStopped(f"{type(error).__name__}: {error}") from error
        if watches not in done:
            raise OperatorStopped("a part of the operator ended: see the log above")

    async def _watch(self) -> None:
        namespaces = self._settings.watch_namespaces
        registry = handlers.registry(
            self._watches,
            on_model=self._queue.add,
            on_child=self._child_event,
            on_pod=self._pod_event,
            probe=self.probe,
            login=kopf.login_with_service_account if _in_cluster() else kopf.login_with_kubeconfig,
        )
        await kopf.operator(
            registry=registry,
            standalone=True,
            clusterwide=not namespaces,
            namespaces=namespaces,
            liveness_endpoint=f"http://0.0.0.0:{self._settings.health_port}/healthz",
        )

    def _child_event(self, key: Key, child: ChildFacts, deleted: bool) -> None:
        self._reconciler.child_changed(key, child, deleted)
        self._queue.add(key)

    def _pod_event(self, key: Key, pod: PodFacts) -> None:
        if pod.ready and pod.uid not in self._scraper.samples:
            self._new_pod.set()
        self._queue.add(key)

    async def _election(self) -> None:
        """Holds the Lease. Ends when it is lost: then the process must not act any more."""
        if not self._settings.leader_election.enabled:
            self._leading.set()
            await asyncio.Event().wait()

        def lead() -> None:
            logger.info("leading as %s", self._identity)
            self._leading.set()

        await self._lease.hold(lead)
        raise OperatorStopped("the Lease was lost: another operator may be acting")

    async def _worker(self) -> None:
        await self._scraped.wait()  # else a restart would take back what the status says, and say it again
        await self._queue.run(self._reconciler.reconcile)

    async def _resync(self) -> None:
        """Looks at everything anew now and then, by lists of its own: whatever a watch missed is made good."""
        while True:
            self._seen_alive["resync"] = time.monotonic()
            await asyncio.sleep(self._settings.resync_seconds)
            if self._scraped.is_set():
                try:
                    await self.look_again()
                except ApiError as error:
                    logger.warning("resync put off: %s", error)

    async def look_again(self) -> None:
        """Has every model reconciled, and forgets what the indices hold and the cluster does not."""
        namespaces = self._settings.watch_namespaces
        known = self._watches.known()  # before the lists: what is made meanwhile is not taken for gone
        exists = set()
        for kind in (POD, *KINDS.values()):
            exists |= await self._cluster.uids(kind, namespaces)
        gone = [(key, item) for key, item in known if item.uid not in exists]
        self._watches.drop(item.uid for _, item in gone)
        for key, item in gone:
            if isinstance(item, ChildFacts):
                self._reconciler.child_changed(key, item, deleted=True)
        for key in {*await self._cluster.model_keys(namespaces), *(key for key, _ in gone)}:
            self._queue.add(key)

    async def _telemetry(self) -> None:
        """Reads the servers' statistics, and has the models reconciled whose figures changed."""
        await self._leading.wait()
        await self._watches.synced.wait()
        async with aiohttp.ClientSession() as session:
            for pause in (FIRST_RATE_SECONDS, 0):  # two readings make a rate
                serving = self._serving()
                await self._scraper.scrape(session, [pod for _, pod in serving])
                await asyncio.sleep(pause if serving else 0)
            self._scraped.set()
            while True:
                self._seen_alive["telemetry"] = time.monotonic()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._new_pod.wait(), self._settings.telemetry.interval_seconds)
                    await asyncio.sleep(NEW_POD_SECONDS)
                self._new_pod.clear()
                serving = self._serving()
                before = self._figures(serving)
                await self._scraper.scrape(session, [pod for _, pod in serving])
                after = self._figures(serving)
                for key in after:
                    if after[key] != before[key]:
                        self._queue.add(key)

    def _serving(self) -> list[tuple[Key, PodFacts]]:
        return [(key, pod) for key, pod in self._watches.all_pods() if pod.ready and not pod.terminating]

    def _figures(self, pods: list[tuple[Key, PodFacts]]) -> dict[Key, list[Any]]:
        """What the status would show of each model's servers."""
        figures: dict[Key, list[Any]] = {}
        for key, pod in pods:
            sample = self._scraper.samples.get(pod.uid)
            shown = sample and (telemetry.measured([sample]), telemetry.load([sample]), sample.stats.kernel)
            figures.setdefault(key, []).append((pod.uid, shown, self._scraper.errors.get(pod.uid)))
        return figures

    def probe(self) -> dict[str, float]:
        """Ages in seconds. Raises when a loop or a reconciliation is stuck."""
        ages = {name: time.monotonic() - seen for name, seen in self._seen_alive.items()}
        if not self._leading.is_set():
            del ages["telemetry"]  # it waits for the Lease, and that is its job
        limits = {
            "resync": self._settings.resync_seconds + STUCK_SECONDS,
            "telemetry": self._settings.telemetry.interval_seconds + STUCK_SECONDS,
            "reconciliation": STUCK_SECONDS,
        }
        ages["reconciliation"] = self._queue.oldest_active_seconds()
        for name, age in ages.items():
            if age > limits[name]:
                raise OperatorStopped(f"{name} has been stuck for {age:.0f} s")
        return {name: round(age, 1) for name, age in ages.items()}


def now() -> str:
    """The time as Kubernetes writes it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _in_cluster() -> bool:
    return "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ


async def _configuration() -> Configuration:
    configuration = Configuration()
    if _in_cluster():
        load_incluster_config(client_configuration=configuration)
    else:
        path = Path(os.environ.get("KUBECONFIG") or KUBE_CONFIG_DEFAULT_LOCATION).expanduser()
        await load_kube_config(config_file=str(path), client_configuration=configuration)
    return configuration


async def run(settings: Settings) -> None:
    """Runs the operator with the cluster of the pod, of `KUBECONFIG`, or of `~/.kube/config`."""
    identity = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
    async with ApiClient(await _configuration()) as client:
        await App(settings, Cluster(client, identity), identity).run()
