"""The Lease by which one operator acts at a time.

As in client-go's leader election: whoever holds the Lease renews it; others take it over once they have seen it
unchanged for its whole duration, by their own clock, so that no two clocks need to agree. A holder that could not renew
for two thirds of the duration stops acting, before anybody else may start. Updates carry the resource version, so of
two that try at once one fails. (The `LeaseLock` of the kubernetes client, version 37, cannot create a Lease.)
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import time
from collections.abc import Callable
from typing import Any

from .cluster import ApiError, Cluster
from .settings import LeaderElection

logger = logging.getLogger(__name__)


class Lease:
    """One candidate for leadership."""

    def __init__(self, cluster: Cluster, settings: LeaderElection, identity: str) -> None:
        self._cluster = cluster
        self._settings = settings
        self._identity = identity
        self._retry = settings.lease_seconds / 5
        self._deadline = settings.lease_seconds * 2 / 3
        self._observed: tuple[str, float] | None = None  # resource version, and when we first saw it

    async def hold(self, lead: Callable[[], None]) -> None:
        """Waits for leadership, calls `lead`, and keeps it. Returns when it was lost."""
        while not await self._try():
            await asyncio.sleep(self._retry)
        lead()
        renewed = time.monotonic()
        while time.monotonic() - renewed < self._deadline:
            await asyncio.sleep(self._retry)
            if await self._try(self._deadline - (time.monotonic() - renewed)):
                renewed = time.monotonic()

    async def release(self) -> None:
        """Gives leadership up, if it is ours, so that the next operator need not wait for the Lease to expire."""
        try:
            lease = await self._cluster.lease(self._settings.namespace, self._settings.name)
            if lease and lease["spec"].get("holderIdentity") == self._identity:
                lease["spec"]["holderIdentity"] = ""
                await self._cluster.put_lease(lease)
        except ApiError as error:
            logger.warning("the Lease was not released: %s", error)

    async def _try(self, seconds: float | None = None) -> bool:
        """Takes or renews the Lease, once. False: somebody else holds it, or the API server did not answer in time."""
        try:
            async with asyncio.timeout(seconds if seconds is not None else self._deadline):
                return await self._take()
        except (ApiError, TimeoutError) as error:
            why = str(error) or "no answer in time"
            logger.warning("Lease %s/%s: %s", self._settings.namespace, self._settings.name, why)
            return False

    async def _take(self) -> bool:
        lease = await self._cluster.lease(self._settings.namespace, self._settings.name)
        if lease and not self._may_take(lease):
            return False
        if lease is None:
            lease = {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": self._settings.name, "namespace": self._settings.namespace},
                "spec": {},
            }
        spec = lease["spec"]
        renewed = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        if spec.get("holderIdentity") != self._identity:
            spec["acquireTime"] = renewed
            spec["leaseTransitions"] = spec.get("leaseTransitions", 0) + 1
        spec.update(holderIdentity=self._identity, leaseDurationSeconds=self._settings.lease_seconds, renewTime=renewed)
        try:
            await self._cluster.put_lease(lease)
        except ApiError as error:
            if error.status == 409:  # somebody was faster
                return False
            raise
        return True

    def _may_take(self, lease: dict[str, Any]) -> bool:
        version = lease["metadata"]["resourceVersion"]
        if self._observed is None or self._observed[0] != version:
            self._observed = (version, time.monotonic())
        holder = lease["spec"].get("holderIdentity")
        duration = lease["spec"].get("leaseDurationSeconds", self._settings.lease_seconds)
        return not holder or holder == self._identity or time.monotonic() - self._observed[1] >= duration
