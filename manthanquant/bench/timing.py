"""How everything here is timed, and what the card can do at most.

A measurement is the median of `REPEATS` replays of a CUDA graph, by events, over the calls in the graph. A case hands
in several calls on inputs of their own, more bytes together than the L2 cache holds, so that each reads device memory;
the graph repeats them until it holds `GRAPH_CALLS`, about as many as a model has layers, so that the graph's own start
counts as little as in a step of an engine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

REPEATS = 20
WARM_UP = 3
GRAPH_CALLS = 24
ROOF_BYTES = 4 << 30

Call = Callable[[], object]


def milliseconds(calls: Sequence[Call], repeats: int = REPEATS, graph_calls: int = GRAPH_CALLS) -> float:
    """Median time of one of `calls`, captured in turn in one graph until it holds at least `graph_calls`."""
    rounds = -(-graph_calls // len(calls))
    for call in calls:  # outside the capture: builds, tables, first-use allocations
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return _median(graph.replay, repeats) / (rounds * len(calls))


def eager_milliseconds(call: Call, inner: int = 50, repeats: int = REPEATS) -> float:
    """Median time of a call outside a graph, launch overheads included: for code that cannot be captured."""

    def many() -> None:
        for _ in range(inner):
            call()

    return _median(many, repeats) / inner


def _median(run: Callable[[], None], repeats: int) -> float:
    for _ in range(WARM_UP):
        run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


@dataclass(frozen=True)
class Roof:
    """Measured bandwidth of the card, GB/s: of a sum over 4 GiB, and of a copy of as much (both directions counted)."""

    read: float
    copy: float


def measure_roof() -> Roof:
    x = torch.zeros(ROOF_BYTES // 4, device="cuda")
    read = milliseconds([x.sum], graph_calls=1)
    y = torch.empty_like(x)
    copy = milliseconds([lambda: y.copy_(x)], graph_calls=1)
    return Roof(ROOF_BYTES / read / 1e6, 2 * ROOF_BYTES / copy / 1e6)
