"""Which units have exact copies: the bookkeeping of the hot tier, once a step for all layers of a cache group.

The newest tokens and the first few (the attention sinks) are kept exact beside their codes, in a bounded pool of
16-token slots. It is a cache, never state: codes are always written, so prefix caching, preemption and page sharing
stay right whatever the pool holds. Slots are keyed by physical unit (page and unit in it); nobody tells us that a page
was freed, so the rule is:

* A unit gets a slot only in the step that writes its first token, and only if it is then inside the window of its
  request or a sink. So a unit that has a slot has copies of all of its tokens: while it is in the window, each later
  write copies too.
* A unit whose first token is written outside the window loses its slot: what the slot held is gone.
* The slots given out are the least recently touched; each step touches those that its requests read.

All updates are tensor operations with no host synchronisation, so the same code serves CPU and GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manthanquant.formats import UNIT_TOKENS


class HotTable:
    """The slots of one cache group.

    Attributes:
        slot: int32 `[units]`: the slot of each physical unit, or -1. Kernels read this.
        owner: int64 `[slots + 1]`: the unit that holds a slot, or -1. The last entry is a bin for masked writes.
    """

    def __init__(
        self,
        units: int,
        slots: int,
        page_tokens: int,
        recent_tokens: int,
        sink_tokens: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.slots = slots
        self.page_tokens = page_tokens
        self.recent_tokens = recent_tokens
        self.sink_units = -(-sink_tokens // UNIT_TOKENS)
        self._slot = torch.full((units + 1,), -1, dtype=torch.int32, device=device)  # the last entry is a bin
        self.owner = torch.full((slots + 1,), -1, dtype=torch.int64, device=device)
        self._touched = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self._step = 0
        self.evictions_in_window = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def slot(self) -> Tensor:
        return self._slot[:-1]

    def update(self, slot_mapping: Tensor, block_table: Tensor, seq_lens: Tensor, query_start_loc: Tensor) -> Tensor:
        """One step's bookkeeping, before any layer stores.

        Args: as `reference.attention` and `reference.store` take them.

        Returns:
            int64 `[T]`: where each new token's exact copy goes (slot * 16 + offset), or -1.
        """
        self._step += 1
        bin_unit, bin_slot = self._slot.shape[0] - 1, self.slots
        device = slot_mapping.device
        tokens = slot_mapping.shape[0]
        starts, lengths = query_start_loc.long(), seq_lens.long()
        # Tokens of a padded batch lie past the last request's end: their row is the last one's, their slot -1.
        index = torch.arange(tokens, device=device)
        row = torch.searchsorted(starts[1:].contiguous(), index, right=True).clamp(max=lengths.shape[0] - 1)
        position = lengths[row] - (starts[row + 1] - index)
        unit = torch.where(slot_mapping >= 0, slot_mapping // UNIT_TOKENS, bin_unit)
        logical = position // UNIT_TOKENS
        above = (lengths - self.recent_tokens).clamp_min(0) // UNIT_TOKENS
        wanted = (slot_mapping >= 0) & ((logical < self.sink_units) | (logical >= above[row]))
        if self.recent_tokens <= 0:
            wanted &= logical < self.sink_units

        self._touch(block_table, lengths, above)
        opens = (slot_mapping >= 0) & (slot_mapping % UNIT_TOKENS == 0)
        # A rewritten unit's old copies are gone; it may get a fresh slot below.
        stale = self._slot[torch.where(opens, unit, bin_unit)].long()
        stale = torch.where(opens & (stale >= 0), stale, bin_slot)
        self.owner[stale] = -1
        self._touched[stale] = 0
        self._slot[torch.where(opens, unit, bin_unit)] = -1

        # The k-th unit that opens takes the k-th least recently touched slot; past the pool's size it gets none.
        take = opens & wanted
        rank = torch.cumsum(take, 0) - 1
        take &= rank < self.slots
        order = torch.argsort(self._touched[:-1], stable=True)
        given = torch.where(take, order[rank.clamp(0, self.slots - 1)], bin_slot)
        evicted = self.owner[given]
        lost = take & (evicted >= 0)
        self.evictions_in_window += (lost & (self._touched[given] == self._step)).sum()
        self._slot[torch.where(lost, evicted, bin_unit)] = -1
        self.owner[given] = torch.where(take, unit, -1)
        self._touched[given] = self._step
        self._slot[torch.where(take, unit, bin_unit)] = given.int()
        self._slot[bin_unit] = -1
        self.owner[bin_slot] = -1

        slot = self._slot[unit].long()
        return torch.where(wanted & (slot >= 0), slot * UNIT_TOKENS + slot_mapping % UNIT_TOKENS, -1)

    def _touch(self, block_table: Tensor, lengths: Tensor, above: Tensor) -> None:
        """Marks the slots that this step's requests read."""
        per_page = self.page_tokens // UNIT_TOKENS
        window = -(-self.recent_tokens // UNIT_TOKENS) + 1
        device = lengths.device
        recent = above[:, None] + torch.arange(window, device=device)
        sinks = torch.arange(self.sink_units, device=device).expand(lengths.shape[0], -1)
        logical = torch.cat([sinks, recent], 1)
        valid = logical * UNIT_TOKENS < lengths[:, None]
        page = block_table.long().gather(1, (logical // per_page).clamp(max=block_table.shape[1] - 1))
        unit = torch.where(valid, page * per_page + logical % per_page, self._slot.shape[0] - 1)
        slot = self._slot[unit.clamp(0, self._slot.shape[0] - 1)].long()
        self._touched[torch.where(slot >= 0, slot, self.slots)] = self._step
