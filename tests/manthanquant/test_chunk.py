"""Attention of a prefill chunk against the definition, and its prefix against the reference's cache."""

import math

import pytest
import torch
from support.cases import make_case
from torch import Tensor

from manthanquant import chunk, formats, reference
from manthanquant.reference import HotPool
from manthanquant.transform import default_transform


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, soft_cap: float | None
) -> Tensor:
    m, heads, _ = query.shape
    length, kv_heads, _ = key.shape
    out = torch.empty(query.shape, dtype=torch.float64)
    for i in range(m):
        last = length - m + i
        first = 0 if window is None else max(0, last - window + 1)
        for head in range(heads):
            k = key[first : last + 1, head // (heads // kv_heads)].double()
            v = value[first : last + 1, head // (heads // kv_heads)].double()
            score = k @ query[i, head].double() * scale
            if soft_cap is not None:
                score = soft_cap * torch.tanh(score / soft_cap)
            out[i, head] = score.softmax(0) @ v
    return out


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize(("m", "length"), [(1, 1), (9, 9), (4, 20), (1, 33)])
def test_attend(m: int, length: int, window: int | None, soft_cap: float | None) -> None:
    generator = torch.Generator().manual_seed(m + length)
    query = torch.randn(m, 6, 64, generator=generator)
    key, value = (torch.randn(length, 2, 64, generator=generator) for _ in range(2))
    expected = by_definition(query, key, value, 0.125, window, soft_cap)
    found = chunk.attend(query, key, value, 0.125, window, soft_cap)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_soft_cap_over_several_query_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "QUERY_BLOCK", 4)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(11, 2, 64, generator=generator) for _ in range(3))
    expected = by_definition(query, key, value, 0.125, 6, 2.0)
    torch.testing.assert_close(chunk.attend(query, key, value, 0.125, 6, 2.0).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [0, 7, 40])
@pytest.mark.parametrize("with_hot", [False, True])
def test_prefix_is_what_the_reference_attends_to(first: int, with_hot: bool) -> None:
    """The chunk's last token over prefix and chunk, exact chunk or not, is one attention over the cache."""
    fmt, head_size, page_tokens, length, sinks, recent = formats.K42V3, 64, 32, 75, 4, 32
    case = make_case([length], [1], page_tokens)
    transform = default_transform(fmt, head_size)
    generator = torch.Generator().manual_seed(1)
    key, value = (torch.randn(length, 2, head_size, generator=generator) for _ in range(2))
    cache = torch.zeros(case.pages, 2, page_tokens, fmt.token_bytes(head_size), dtype=torch.uint8)
    hot, hot_slots = None, None
    if with_hot:
        units = case.pages * page_tokens // formats.UNIT_TOKENS
        pool = torch.zeros(2, units, 2, formats.UNIT_TOKENS, head_size, dtype=torch.bfloat16)
        hot = HotPool(pool[0], pool[1], torch.arange(units, dtype=torch.int32))
        hot_slots = case.slots()
    reference.store(key, value, cache, case.slots(), fmt, transform, hot, hot_slots)
    k, v = chunk.read_prefix(cache, case.block_table[0], first, length, fmt, transform, head_size, hot, sinks, recent)
    assert k.shape == (length - first, 2, head_size)
    query = torch.randn(1, 4, head_size, generator=generator)
    expected = reference.attention(
        query,
        cache,
        case.block_table,
        case.seq_lens,
        case.query_start_loc,
        fmt,
        transform,
        0.2,
        window=length - first,
        sink_tokens=sinks,
        recent_tokens=recent,
        hot=hot,
    )
    found = chunk.attend(query, k, v, 0.2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    exact = (k - key[first:]).abs().amax((1, 2)) < 0.05
    assert bool(exact[-recent + 1 :].all()) == with_hot
    assert math.isfinite(float(k.sum()))
