"""Small random serving cases that the tests of the reference and of the kernels share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Case:
    """Requests over random pages: what a step of an engine hands to a backend."""

    lengths: list[int]
    new: list[int]  # new tokens of each request, the last ones of its length
    block_table: Tensor
    pages: int
    page_tokens: int

    @property
    def seq_lens(self) -> Tensor:
        return torch.tensor(self.lengths, dtype=torch.int32)

    @property
    def query_start_loc(self) -> Tensor:
        return torch.tensor([0, *torch.tensor(self.new).cumsum(0).tolist()], dtype=torch.int32)

    def slots(self, first: list[int] | None = None) -> Tensor:
        """Slots of the tokens from `first` (by request; default: all) to the request's length, int64."""
        rows = []
        for row, length in enumerate(self.lengths):
            position = torch.arange(0 if first is None else first[row], length)
            page = self.block_table[row, position // self.page_tokens].long()
            rows.append(page * self.page_tokens + position % self.page_tokens)
        return torch.cat(rows)


def make_case(lengths: list[int], new: list[int], page_tokens: int, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    need = [-(-length // page_tokens) for length in lengths]
    pages = sum(need) + 3
    order = torch.randperm(pages, generator=generator).int()
    table = torch.zeros(len(lengths), max(need), dtype=torch.int32)
    first = 0
    for row, count in enumerate(need):
        table[row, :count] = order[first : first + count]
        first += count
    return Case(lengths, new, table, pages, page_tokens)
