import math

import pytest
import torch
from support.cases import make_case

from manthanquant import reference
from manthanquant.capacity import slots_needed
from manthanquant.formats import K3V3, K42V3, PAGED_FORMATS, SUPPORTED_HEAD_SIZES, UNIT_TOKENS
from manthanquant.hot import HotTable
from manthanquant.reference import HotPool
from manthanquant.transform import LayerTransform, default_transform, gain_transform, hadamard_transform

KV_HEADS, HEADS = 2, 6


def new_cache(case, fmt, head_size):
    shape = (case.pages, KV_HEADS, case.page_tokens, fmt.token_bytes(head_size))
    return torch.randint(0, 256, shape, dtype=torch.uint8)  # stale bytes of an earlier owner


def plain_attention(query, keys, values, case, scale, window=None, soft_cap=None):
    """Attention over exact keys and values `[tokens of all requests, KV heads, D]`, request by request."""
    out, first, start = [], 0, case.query_start_loc.tolist()
    for row, length in enumerate(case.lengths):
        k = keys[first : first + length].repeat_interleave(HEADS // KV_HEADS, 1)
        v = values[first : first + length].repeat_interleave(HEADS // KV_HEADS, 1)
        q = query[start[row] : start[row + 1]]
        score = torch.einsum("mhd,lhd->hml", q, k) * scale
        if soft_cap:
            score = soft_cap * torch.tanh(score / soft_cap)
        gap = torch.arange(length - q.shape[0], length)[:, None] - torch.arange(length)[None]
        hidden = (gap < 0) | (gap >= (window or math.inf))
        out.append(torch.einsum("hml,lhd->mhd", score.masked_fill(hidden, -math.inf).softmax(-1), v))
        first += length
    return torch.cat(out)


def coded_transform(head_size, fmt, seed=0):
    torch.manual_seed(seed)
    mean = torch.randn(KV_HEADS, head_size)
    order = torch.stack([torch.randperm(head_size) for _ in range(KV_HEADS)])
    key = gain_transform(fmt, "key", order, torch.rand(KV_HEADS, head_size) + 0.5, mean)
    return LayerTransform(key, hadamard_transform(fmt, "value", head_size))


@pytest.mark.parametrize("fmt", PAGED_FORMATS.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("head_size", SUPPORTED_HEAD_SIZES)
@pytest.mark.parametrize("page_tokens", [16, 64])
def test_attention_equals_attention_over_the_dequantised_vectors(fmt, head_size, page_tokens):
    torch.manual_seed(4)
    case = make_case([1, 17, 70], [1, 3, 70], page_tokens)
    transform = coded_transform(head_size, fmt)
    total = sum(case.lengths)
    key, value = torch.randn(total, KV_HEADS, head_size), torch.randn(total, KV_HEADS, head_size)
    query = torch.randn(sum(case.new), HEADS, head_size)
    cache = new_cache(case, fmt, head_size)
    assert reference.store(key, value, cache, case.slots(), fmt, transform) == 0
    from manthanquant.quantize import dequantize, quantize

    seen = {}
    for side, x, t in (("key", key, transform.key), ("value", value, transform.value)):
        coded = quantize(t.apply(x), fmt, side)
        seen[side] = t.undo(dequantize(coded.codes, coded.scale_bytes, fmt, side))
    for window, soft_cap in ((None, None), (9, None), (None, 5.0)):
        expected = plain_attention(query, seen["key"], seen["value"], case, 0.2, window, soft_cap)
        got = reference.attention(
            query, cache, case.block_table, case.seq_lens, case.query_start_loc, fmt, transform, 0.2,
            window=window, soft_cap=soft_cap,
        )  # fmt: skip
        assert torch.allclose(got, expected, atol=2e-4)


def test_store_leaves_other_tokens_alone_and_skips_padding():
    fmt, head_size = K3V3, 64
    case = make_case([40], [40], 16)
    transform = default_transform(fmt, head_size)
    key, value = torch.randn(40, KV_HEADS, head_size), torch.randn(40, KV_HEADS, head_size)
    whole = new_cache(case, fmt, head_size)
    one_by_one = whole.clone()
    slots = case.slots()
    reference.store(key, value, whole, slots, fmt, transform)
    for i in torch.randperm(40):
        padded = torch.tensor([-1, int(slots[i]), -1])
        rows = torch.stack([torch.full_like(key[i], float("nan")), key[i], key[i]])
        values = torch.stack([value[i], value[i], value[i]])
        assert reference.store(rows, values, one_by_one, padded, fmt, transform) == 0
    assert torch.equal(whole, one_by_one)


def test_non_finite_vectors_are_counted_and_do_not_spread():
    fmt, head_size = K42V3, 64
    case = make_case([20, 20], [1, 1], 16)
    transform = default_transform(fmt, head_size)
    key, value = torch.randn(40, KV_HEADS, head_size), torch.randn(40, KV_HEADS, head_size)
    clean, dirty = new_cache(case, fmt, head_size), new_cache(case, fmt, head_size)
    reference.store(key, value, clean, case.slots(), fmt, transform)
    key[3, 1, 5], value[4, 1, 0], value[5, 1, 2] = float("nan"), float("inf"), float("-inf")
    assert reference.store(key, value, dirty, case.slots(), fmt, transform) == 3
    query = torch.randn(2, HEADS, head_size)
    a, b = (
        reference.attention(query, c, case.block_table, case.seq_lens, case.query_start_loc, fmt, transform, 0.125)
        for c in (clean, dirty)
    )
    assert torch.isfinite(b).all()
    assert torch.equal(a[1], b[1]) and torch.equal(a[0, :3], b[0, :3])  # the other request, the other KV head


@pytest.mark.parametrize(("recent", "sinks"), [(32, 4), (32, 0), (0, 4)])
def test_exact_tiers_are_exact(recent, sinks):
    """Prefill, then decode: tokens in the window and the sinks attend as if never coded, the rest as coded."""
    torch.manual_seed(5)
    fmt, head_size, page_tokens = K3V3, 64, 32
    case = make_case([150], [1], page_tokens)
    transform = coded_transform(head_size, fmt)
    total = case.lengths[0]
    key = torch.randn(total, KV_HEADS, head_size).bfloat16()
    value = torch.randn(total, KV_HEADS, head_size).bfloat16()
    cache = new_cache(case, fmt, head_size)
    slots = slots_needed(1, recent, sinks)
    table = HotTable(case.pages * page_tokens // UNIT_TOKENS, slots, page_tokens, recent, sinks)
    pool = HotPool(*(torch.zeros(slots, KV_HEADS, UNIT_TOKENS, head_size).bfloat16() for _ in range(2)), table.slot)
    every = case.slots()
    for first, last in ((0, 100), (100, 149), (149, 150)):
        hot_slots = table.update(
            every[first:last], case.block_table, torch.tensor([last]), torch.tensor([0, last - first])
        )
        reference.store(key[first:last], value[first:last], cache, every[first:last], fmt, transform, pool, hot_slots)
    below, above = reference.exact_units(total, sinks, recent)
    seen = {}
    for side, x, t in (("key", key, transform.key), ("value", value, transform.value)):
        stored = t.undo(reference.read(cache, case.block_table[0], total, fmt, side, head_size))
        unit = torch.arange(total) // UNIT_TOKENS
        exact = ((unit < below) | (unit >= above)) & ((recent > 0) | (unit < below))
        seen[side] = torch.where(exact[:, None, None], x.float(), stored)
    query = torch.randn(1, HEADS, head_size)
    got = reference.attention(
        query, cache, case.block_table, case.seq_lens, case.query_start_loc, fmt, transform, 0.125,
        sink_tokens=sinks, recent_tokens=recent, hot=pool,
    )  # fmt: skip
    assert torch.allclose(got, plain_attention(query, seen["key"], seen["value"], case, 0.125), atol=2e-4)
