"""Progress of a long run: each step's time, and the most memory that this machine used during it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SAMPLE_SECONDS = 0.25


def memory_used() -> int:
    """Bytes of this machine's memory that are not available to a new process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return (int(fields["MemTotal"].split()[0]) - int(fields["MemAvailable"].split()[0])) * 1024


class _Peak:
    """The highest memory use seen until `stop`, sampled by a thread."""

    def __init__(self) -> None:
        self.value = memory_used()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.value = max(self.value, memory_used())

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self.value


class Steps:
    """Prints steps as they run, and all of them at the end."""

    def __init__(self) -> None:
        self.finished: list[tuple[str, float, int]] = []

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        print(f"\n== {title}", flush=True)
        started, peak = time.monotonic(), _Peak()
        try:
            yield
        finally:
            row = (title, time.monotonic() - started, peak.stop())
            self.finished.append(row)
            print(f"   {self._row(row)}", flush=True)

    @staticmethod
    def _row(row: tuple[str, float, int]) -> str:
        title, seconds, memory = row
        return f"{seconds:7.1f} s  {memory / 2**30:5.1f} GiB  {title}"

    def summary(self) -> str:
        """A table of all steps. Memory is the machine's, other programs included."""
        total = sum(seconds for _, seconds, _ in self.finished)
        rows = [self._row(row) for row in self.finished]
        return "\n".join(["   time    memory in use (most)", *rows, f"{total:7.1f} s             in all"])


def note(text: str) -> None:
    """A line of detail below the step's title."""
    print(f"   {text}", flush=True)
