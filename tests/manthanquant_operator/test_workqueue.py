"""The work queue: once, never twice at a time, again after a failure, ever more slowly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from manthanquant_operator import workqueue
from manthanquant_operator.facts import Key
from manthanquant_operator.workqueue import WorkQueue

A, B = ("ns", "a"), ("ns", "b")


def _run(work: Callable[[Key, WorkQueue, list[Key]], float | None], *keys: Key, workers: int = 1) -> list[Key]:
    """What was worked on, in order, until nothing more is due at once."""
    seen: list[Key] = []

    async def main() -> None:
        queue = WorkQueue()

        async def one(key: Key) -> float | None:
            seen.append(key)
            await asyncio.sleep(0)
            return work(key, queue, seen)

        for key in keys:
            queue.add(key)
        tasks = [asyncio.create_task(queue.run(one)) for _ in range(workers)]
        for _ in range(200):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    return seen


def test_a_key_is_queued_once() -> None:
    assert _run(lambda *_: None, A, B, A, A) == [A, B]


def test_a_key_asked_for_meanwhile_is_worked_on_again_afterwards() -> None:
    def work(key: Key, queue: WorkQueue, seen: list[Key]) -> None:
        if len(seen) == 1:
            queue.add(key)
            queue.add(key)

    assert _run(work, A) == [A, A]


def test_a_key_is_never_worked_on_twice_at_a_time() -> None:
    active: set[Key] = set()
    most = []

    async def main() -> None:
        queue = WorkQueue()

        async def one(key: Key) -> None:
            assert key not in active
            active.add(key)
            most.append(len(active))
            queue.add(key) if len(most) < 20 else None
            await asyncio.sleep(0)
            active.discard(key)

        queue.add(A)
        queue.add(B)
        tasks = [asyncio.create_task(queue.run(one)) for _ in range(4)]
        for _ in range(300):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    assert max(most) == 2 and len(most) >= 20


def test_a_failure_comes_back_and_does_not_stop_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workqueue, "FIRST_BACKOFF_SECONDS", 0.0)
    tries = {A: 3, B: 1}

    def work(key: Key, queue: WorkQueue, seen: list[Key]) -> None:
        tries[key] -= 1
        if tries[key]:
            raise RuntimeError("made to fail")

    assert sorted(_run(work, A, B)) == [A, A, A, B]


def test_the_backoff_doubles_to_a_bound_and_a_success_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[float] = []
    outcomes = iter([True] * 12 + [False] + [True])

    def later(self: WorkQueue, key: Key, seconds: float) -> None:
        delays.append(seconds)
        self.add(key)

    monkeypatch.setattr(WorkQueue, "add_later", later)

    def work(*_: object) -> float | None:
        failing = next(outcomes, None)
        if failing is None:
            return None
        if failing:
            raise RuntimeError("made to fail")
        return 0.5

    _run(work, A)
    assert delays[:4] == [1.0, 2.0, 4.0, 8.0]
    assert delays[9:12] == [workqueue.MAX_BACKOFF_SECONDS] * 3
    assert delays[12:14] == [0.5, 1.0]


def test_of_two_appointments_the_earlier_one_stands() -> None:
    async def main() -> list[float]:
        queue = WorkQueue()
        loop = asyncio.get_running_loop()
        for seconds in (50.0, 10.0, 30.0):
            queue.add_later(A, seconds)
        due = [round(timer.when() - loop.time()) for timer in queue._timers.values()]
        queue.add(A)
        return [*due, len(queue._timers)]

    assert asyncio.run(main()) == [10, 0]


def test_the_age_of_the_longest_work_is_known() -> None:
    ages: list[float] = []

    def work(key: Key, queue: WorkQueue, seen: list[Key]) -> None:
        ages.append(queue.oldest_active_seconds())

    _run(work, A)
    assert ages[0] > 0
    assert WorkQueue().oldest_active_seconds() == 0
