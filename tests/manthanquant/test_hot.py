import random

import torch

from manthanquant.capacity import slots_needed
from manthanquant.formats import UNIT_TOKENS
from manthanquant.hot import HotTable

PAGE, RECENT, SINKS, PAGES = 32, 40, 4, 40
PER_PAGE = PAGE // UNIT_TOKENS


class Engine:
    """A toy scheduler: requests grow by random steps, pages are freed and reused at once by others."""

    def __init__(self, seed, requests, slots):
        self.random = random.Random(seed)
        self.free = list(range(PAGES))
        self.running = {}
        self.limit = requests
        self.table = HotTable(PAGES * PER_PAGE, slots, PAGE, RECENT, SINKS)
        self.pool = torch.full((slots, UNIT_TOKENS), -1.0)  # what a pool slot holds: the token's stamp
        self.truth = torch.full((PAGES * PAGE,), -2.0)  # the stamp written last to each cache slot
        self.stamp = 0

    def step(self):
        if len(self.running) < self.limit and self.random.random() < 0.5:
            self.running[self.stamp + 1e6] = ([], 0)
        for name in [n for n in self.running if self.random.random() < 0.05]:
            self.free += self.running.pop(name)[0]
        rows = []
        for name, (pages, length) in list(self.running.items()):
            new = self.random.choice([1, 1, 1, 5, 70])
            need = -(-(length + new) // PAGE) - len(pages)
            if need > len(self.free):
                continue
            self.random.shuffle(self.free)
            pages = pages + [self.free.pop() for _ in range(need)]
            self.running[name] = (pages, length + new)
            rows.append((pages, length, length + new))
        if not rows:
            return rows
        slots = [p[i // PAGE] * PAGE + i % PAGE for p, a, b in rows for i in range(a, b)]
        table = torch.zeros(len(rows), max(len(p) for p, _, _ in rows), dtype=torch.int32)
        for i, (p, _, _) in enumerate(rows):
            table[i, : len(p)] = torch.tensor(p)
        starts = torch.tensor([0, *torch.tensor([b - a for _, a, b in rows]).cumsum(0)])
        padded = torch.tensor([*slots, -1, -1])
        hot = self.table.update(padded, table, torch.tensor([b for _, _, b in rows]), starts)
        assert (hot[-2:] == -1).all()
        for cache_slot, where in zip(slots, hot.tolist()):
            self.stamp += 1
            self.truth[cache_slot] = self.stamp
            if where >= 0:
                self.pool[where // UNIT_TOKENS, where % UNIT_TOKENS] = self.stamp
        return rows

    def units_read_exactly(self, rows):
        for pages, _, length in rows:
            for unit in range(-(-length // UNIT_TOKENS)):
                if unit < -(-SINKS // UNIT_TOKENS) or unit >= max(0, length - RECENT) // UNIT_TOKENS:
                    written = min(UNIT_TOKENS, length - unit * UNIT_TOKENS)
                    yield pages[unit // PER_PAGE] * PER_PAGE + unit % PER_PAGE, written

    def check(self, rows):
        missing = 0
        for unit, count in self.units_read_exactly(rows):
            slot = int(self.table.slot[unit])
            if slot < 0:
                missing += 1
                continue
            assert torch.equal(self.pool[slot, :count], self.truth[unit * UNIT_TOKENS :][:count])
        return missing


def test_a_copy_that_is_read_is_always_the_newest_and_none_is_missing():
    for seed in range(4):
        engine = Engine(seed, requests=5, slots=slots_needed(5, RECENT, SINKS))
        for _ in range(150):
            assert engine.check(engine.step()) == 0
        assert int(engine.table.evictions_in_window) == 0


def test_too_small_a_pool_misses_but_never_lies():
    engine = Engine(9, requests=5, slots=4)
    missing = sum(engine.check(engine.step()) for _ in range(150))
    assert missing > 0
    owners = [u for u in engine.table.owner[:-1].tolist() if u >= 0]
    assert len(owners) == len(set(owners))
    assert all(int(engine.table.slot[u]) == engine.table.owner.tolist().index(u) for u in owners)


def test_no_tier_needs_no_slots():
    assert slots_needed(64, 0, 0) == 0
    assert slots_needed(2, 128, 4) == 2 * (8 + 1 + 1 + 1)
