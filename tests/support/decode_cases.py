"""Caches, queries and tables for decode tests, and the reference's answer to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from manthanquant import reference
from manthanquant.formats import UNIT_TOKENS, Format, Side, get_paged
from manthanquant.transform import (
    LayerTransform,
    SideTransform,
    dense_transform,
    gain_transform,
    hadamard_transform,
)


@dataclass
class Case:
    """One launch. Lengths include the new tokens of each request: `query_tokens`, or `new[request]` where given."""

    format: str = "k3v3"
    head_size: int = 128
    heads: int = 8
    kv_heads: int = 2
    lengths: tuple[int, ...] = (1, 17, 64, 100, 513)
    page_tokens: int = 64
    query_tokens: int = 1
    new: tuple[int, ...] | None = None
    transform: str | tuple[str, str] = "hadamard"  # or "gain", "dense"; both sides or (keys, values)
    dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    soft_cap: float | None = None
    sink_tokens: int = 0
    recent_tokens: int = 0
    key_mean: bool = False
    seed: int = 0
    cp_async: bool = False
    hot_missing: float = 0.3  # share of exact units that lost their slot

    @property
    def fmt(self) -> Format:
        return get_paged(self.format)

    @property
    def starts(self) -> list[int]:
        """Where each request's queries begin, and where the last one's end."""
        return [0, *accumulate(self.new or [self.query_tokens] * len(self.lengths))]

    @property
    def exact(self) -> bool:
        return self.sink_tokens > 0 or self.recent_tokens > 0


@dataclass
class Inputs:
    query: Tensor
    cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    transform: LayerTransform
    hot: reference.HotPool | None
    scale: float
    options: dict[str, float | int | None] = field(default_factory=dict)


def make_transform(case: Case, generator: torch.Generator, device: str) -> LayerTransform:
    fmt, size, heads = case.fmt, case.head_size, case.kv_heads
    random = lambda *shape: torch.randn(*shape, generator=generator, device=device)
    mean = 0.7 * random(heads, size).cpu() if case.key_mean else None

    def make(side: Side, kind: str, mean: Tensor | None) -> SideTransform:
        if kind == "hadamard":
            return hadamard_transform(fmt, side, size, mean)
        if kind == "gain":
            order = torch.stack([torch.randperm(size, generator=generator, device=device) for _ in range(heads)])
            return gain_transform(fmt, side, order.cpu(), random(heads, size).mul(0.3).exp().cpu(), mean)
        matrix = torch.eye(size, device=device) + 0.3 * random(heads, size, size) / size**0.5
        return dense_transform(fmt, side, matrix.cpu(), mean)

    key, value = case.transform if isinstance(case.transform, tuple) else (case.transform, case.transform)
    return LayerTransform(make("key", key, mean), make("value", value, None)).to(device)


def make_inputs(case: Case, device: str = "cuda") -> Inputs:
    """Stores random keys and values with the reference; whatever no token wrote is garbage."""
    generator = torch.Generator(device).manual_seed(case.seed)
    random = lambda *shape: torch.randn(*shape, generator=generator, device=device)
    fmt, size, per_page = case.fmt, case.head_size, case.page_tokens
    pages_of = [-(-length // per_page) for length in case.lengths]
    pages = sum(pages_of) + 2
    order = torch.randperm(pages, generator=generator, device=device).int()
    block_table = torch.full((len(case.lengths), max(1, *pages_of) + 1), 2**30, dtype=torch.int32, device=device)
    slot_mapping, first = [], 0
    for row, (length, count) in enumerate(zip(case.lengths, pages_of)):
        block_table[row, :count] = order[first : first + count]
        first += count
        token = torch.arange(length, device=device)
        slot_mapping.append(block_table[row].long()[token // per_page] * per_page + token % per_page)
    slots = torch.cat(slot_mapping)
    total = slots.shape[0]
    transform = make_transform(case, generator, device)
    key = random(total, case.kv_heads, size).to(torch.bfloat16)
    if transform.key.mean is not None:
        key = (key + transform.key.mean).to(torch.bfloat16)
    value = random(total, case.kv_heads, size).to(torch.bfloat16)
    cache = torch.randint(
        0,
        256,
        (pages, case.kv_heads, per_page, fmt.token_bytes(size)),
        generator=generator,
        device=device,
        dtype=torch.uint8,
    )
    reference.store(key, value, cache, slots, fmt, transform)

    hot = None
    if case.exact:
        units = torch.unique(slots // UNIT_TOKENS)
        slot = torch.full((pages * per_page // UNIT_TOKENS,), -1, dtype=torch.int32, device=device)
        shuffled = torch.randperm(len(units), generator=generator, device=device).int()
        keep = torch.rand(len(units), generator=generator, device=device) >= case.hot_missing
        slot[units[keep]] = shuffled[keep]
        pools = [
            torch.full((len(units), case.kv_heads, UNIT_TOKENS, size), torch.nan, dtype=torch.bfloat16, device=device)
            for _ in range(2)
        ]
        owner = slot[slots // UNIT_TOKENS].long()
        has = owner >= 0
        for pool, x in zip(pools, (key, value)):
            pool[owner[has], :, slots[has] % UNIT_TOKENS] = x[has]
        hot = reference.HotPool(*pools, slot)

    query = (2 * random(case.starts[-1], case.heads, size)).to(case.dtype)
    starts = torch.tensor(case.starts, dtype=torch.int32, device=device)
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    options = {
        "window": case.window,
        "soft_cap": case.soft_cap,
        "sink_tokens": case.sink_tokens,
        "recent_tokens": case.recent_tokens,
    }
    return Inputs(query, cache, block_table, lengths, starts, transform, hot, size**-0.5, options)


def expected(case: Case, inputs: Inputs) -> Tensor:
    """The reference's answer; zeros for requests of length 0."""
    hot = inputs.hot
    if hot is not None:  # the reference multiplies masked values by zero, so they must be finite
        hot = reference.HotPool(hot.key.nan_to_num(), hot.value.nan_to_num(), hot.slot)
    out = torch.zeros_like(inputs.query, dtype=torch.float32)
    for row, length in enumerate(case.lengths):
        new = slice(*case.starts[row : row + 2])
        if length > 0 and new.start < new.stop:
            out[new] = reference.attention(
                inputs.query[new],
                inputs.cache,
                inputs.block_table[row : row + 1],
                inputs.seq_lens[row : row + 1],
                inputs.query_start_loc[row : row + 2] - new.start,
                case.fmt,
                inputs.transform,
                inputs.scale,
                hot=hot,
                **inputs.options,
            )
    return out


def relative_error(actual: Tensor, wanted: Tensor) -> float:
    return float((actual.double() - wanted.double()).norm() / wanted.double().norm())
