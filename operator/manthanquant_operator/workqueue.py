"""A queue of keys, as controllers use it: a key is queued once, is never worked on twice at a time, and comes back
later, ever more slowly, while its work fails.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from .facts import Key

logger = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 300.0

Work = Callable[[Key], Awaitable[float | None]]  # returns the seconds after which to come back, if any


class WorkQueue:
    """Keys to work on. One event loop's: not thread-safe."""

    def __init__(self) -> None:
        self._ready: asyncio.Queue[Key] = asyncio.Queue()
        self._queued: set[Key] = set()
        self._active: dict[Key, float] = {}  # key -> monotonic start
        self._again: set[Key] = set()  # asked for while active
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._failures: dict[Key, int] = {}

    def add(self, key: Key) -> None:
        """Works on the key soon. A key that is being worked on is worked on again afterwards."""
        if timer := self._timers.pop(key, None):
            timer.cancel()
        if key in self._active:
            self._again.add(key)
        elif key not in self._queued:
            self._queued.add(key)
            self._ready.put_nowait(key)

    def add_later(self, key: Key, seconds: float) -> None:
        """Works on the key in so many seconds, unless that is already due earlier."""
        timer = self._timers.get(key)
        loop = asyncio.get_running_loop()
        if key in self._queued or (timer and timer.when() <= loop.time() + seconds):
            return
        if timer:
            timer.cancel()
        self._timers[key] = loop.call_later(seconds, self.add, key)

    def oldest_active_seconds(self) -> float:
        """How long the longest work has been going on; 0 when nothing is."""
        return max((time.monotonic() - start for start in self._active.values()), default=0.0)

    async def run(self, work: Work) -> None:
        """One worker: runs for ever. Several may run at once. A failure of the work is logged and retried."""
        while True:
            key = await self._ready.get()
            self._queued.discard(key)
            self._active[key] = time.monotonic()
            delay: float | None = None
            try:
                delay = await work(key)
                self._failures.pop(key, None)
            except Exception as error:  # the loop must outlive any one key
                failures = self._failures[key] = self._failures.get(key, 0) + 1
                delay = min(FIRST_BACKOFF_SECONDS * 2 ** (failures - 1), MAX_BACKOFF_SECONDS)
                # A refused request explains itself; anything else is a defect, and its place matters.
                logger.warning(
                    "%s/%s: %s; again in %.0f s", *key, error, delay, exc_info=not getattr(error, "transient", False)
                )
            finally:
                del self._active[key]
            if key in self._again:
                self._again.discard(key)
                self.add(key)
            elif delay is not None:
                self.add_later(key, delay)
