"""The C++ store and attention against the reference: every format, head size and instruction set somewhere below."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import make_case
from support.kernels import cpu_kernels, runnable

from manthanquant import reference, selfcheck
from manthanquant.capacity import slots_needed
from manthanquant.formats import K3V3, K4V4, K42V3, K42V42
from manthanquant.hot import HotTable
from manthanquant.ops import ReferenceKernels
from manthanquant.reference import HotPool
from manthanquant.transform import LayerTransform, dense_transform, gain_transform, hadamard_transform

KV_HEADS, HEADS = 2, 6
BUILDS = [
    (K42V3, 64, "cpu-avx512"),
    (K3V3, 80, "cpu-avx512"),
    (K42V42, 128, "cpu-avx512"),
    (K42V3, 256, "cpu-avx512"),
    (K42V42, 80, "cpu-avx2"),
    (K4V4, 96, "cpu-generic"),
]
FMT, SIZE = K42V3, 64


@pytest.fixture(scope="module", params=BUILDS, ids=lambda build: f"{build[0].name}-{build[1]}-{build[2]}")
def build(request):
    fmt, head_size, arch = request.param
    if not runnable(arch):
        pytest.skip(f"this CPU does not run {arch}")
    return fmt, head_size, cpu_kernels(fmt, head_size, arch)


@pytest.fixture(scope="module")
def kernels():
    return cpu_kernels(FMT, SIZE)


def calibrated(fmt, head_size, kv_heads=KV_HEADS):
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(kv_heads, head_size, generator=generator)
    order = torch.stack([torch.randperm(head_size, generator=generator) for _ in range(kv_heads)])
    gain = torch.rand(kv_heads, head_size, generator=generator) + 0.5
    noise = torch.randn(kv_heads, head_size, head_size, generator=generator)
    mix = torch.eye(head_size) + 0.3 * head_size**-0.5 * noise  # well conditioned
    return LayerTransform(gain_transform(fmt, "key", order, gain, mean), dense_transform(fmt, "value", mix))


def poisoned_cache(case, fmt, head_size, kv_heads=KV_HEADS):
    """Every scale that was never written is NaN."""
    return torch.full((case.pages, kv_heads, case.page_tokens, fmt.token_bytes(head_size)), 0xFF, dtype=torch.uint8)


def test_agrees_on_the_selfcheck(build):
    fmt, head_size, kernels = build
    assert selfcheck.check(kernels, fmt, head_size) > 0


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_fuzzed_requests(build, data):
    fmt, head_size, kernels = build
    lengths = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=3))
    new = [data.draw(st.integers(0, min(length, 40))) for length in lengths]
    page_tokens = data.draw(st.sampled_from([16, 48, 64]))
    heads = data.draw(st.sampled_from([2, 6, 10]))
    window = data.draw(st.sampled_from([None, 1, 15, 16, 70]))
    soft_cap = data.draw(st.sampled_from([None, 20.0]))
    sinks, recent = data.draw(st.sampled_from([(0, 0), (4, 0), (0, 33), (4, 64)]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    torch.manual_seed(data.draw(st.integers(0, 1000)))

    case = make_case(lengths, new, page_tokens)
    transform, total = calibrated(fmt, head_size), sum(lengths)
    qkv = torch.randn(total, heads + 2 * KV_HEADS, head_size).to(dtype)
    key, value = qkv[:, heads:-KV_HEADS], qkv[:, -KV_HEADS:]
    units = case.pages * page_tokens // 16
    table = HotTable(units, slots_needed(len(lengths), recent, sinks) or 1, page_tokens, recent, sinks)
    everything = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    hot_slots = table.update(case.slots(), case.block_table, case.seq_lens, everything)
    caches, pools = [], []
    for run in (kernels.store, lambda *a: reference.store(*a[:4], fmt, *a[4:])):
        cache = poisoned_cache(case, fmt, head_size)
        shape = (table.slots, KV_HEADS, 16, head_size)
        pool = HotPool(*(torch.full(shape, math.nan).bfloat16() for _ in range(2)), table.slot)
        assert run(key, value, cache, case.slots(), transform, pool, hot_slots) == 0
        caches.append(cache)
        pools.append(pool)
    selfcheck.compare_codes(caches[0], caches[1], fmt, head_size)
    for found, expected in zip(pools[0][:2], pools[1][:2]):
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16))

    rows = torch.cat([torch.arange(e - n, e) for e, n in zip(everything[1:].tolist(), new)])
    query = qkv[:, :heads][rows]
    options = {"window": window, "soft_cap": soft_cap, "sink_tokens": sinks, "recent_tokens": recent}
    inputs = (query, caches[1], case.block_table, case.seq_lens, case.query_start_loc)
    want = reference.attention(*inputs, fmt, transform, 0.1, hot=pools[1], **options)
    got = kernels.attention(*inputs, transform, 0.1, hot=pools[1], **options)
    if not sum(new):
        return
    selfcheck.compare_outputs(got, want)
    own = (key[rows], value[rows])
    want = ReferenceKernels(fmt, None).attention(*inputs, transform, 0.1, hot=pools[1], chunk=own, **options)
    got = kernels.attention(*inputs, transform, 0.1, hot=pools[1], chunk=own, **options)
    selfcheck.compare_outputs(got, want)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("window", [None, 900])
def test_threads_and_parts_of_a_long_context(kernels, threads, window):
    case = make_case([1500, 3], [2, 1], 64)
    transform = calibrated(FMT, SIZE)
    key, value, query = (torch.randn(1503, n, SIZE) for n in (KV_HEADS, KV_HEADS, HEADS))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cache = poisoned_cache(case, FMT, SIZE)
        kernels.store(key, value, cache, case.slots(), transform)
        inputs = (query[:3], cache, case.block_table, case.seq_lens, case.query_start_loc)
        got = kernels.attention(*inputs, transform, 0.125, window=window)
    finally:
        torch.set_num_threads(before)
    selfcheck.compare_outputs(got, reference.attention(*inputs, FMT, transform, 0.125, window=window))


def test_a_prompt_longer_than_a_tile(kernels):
    case = make_case([150], [150], 32)
    transform = calibrated(FMT, SIZE)
    key, value, query = (torch.randn(150, n, SIZE) for n in (KV_HEADS, KV_HEADS, HEADS))
    cache = poisoned_cache(case, FMT, SIZE)
    kernels.store(key, value, cache, case.slots(), transform)
    inputs = (query, cache, case.block_table, case.seq_lens, case.query_start_loc)
    got = kernels.attention(*inputs, transform, 0.125)
    selfcheck.compare_outputs(got, reference.attention(*inputs, FMT, transform, 0.125))


def test_a_prompt_whose_own_tokens_are_exact(kernels):
    """A first chunk is then plain attention; no code is read."""
    case = make_case([150], [150], 32)
    key, value, query = (torch.randn(150, n, SIZE) for n in (KV_HEADS, KV_HEADS, HEADS))
    cache = poisoned_cache(case, FMT, SIZE)
    inputs = (query, cache, case.block_table, case.seq_lens, case.query_start_loc)
    got = kernels.attention(*inputs, calibrated(FMT, SIZE), 0.125, chunk=(key, value))
    heads_first = [x.repeat_interleave(HEADS // x.shape[1], 1).transpose(0, 1) for x in (query, key, value)]
    want = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, scale=0.125)
    assert torch.allclose(got, want.transpose(0, 1), atol=1e-5)


def test_output_of_any_dtype_and_stride(kernels):
    case = make_case([40], [40], 16)
    transform = calibrated(FMT, SIZE)
    key, value, query = (torch.randn(40, n, SIZE) for n in (KV_HEADS, KV_HEADS, HEADS))
    cache = poisoned_cache(case, FMT, SIZE)
    kernels.store(key, value, cache, case.slots(), transform)
    inputs = (query, cache, case.block_table, case.seq_lens, case.query_start_loc)
    want = kernels.attention(*inputs, transform, 0.125)
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.zeros(SIZE, HEADS, 41, dtype=dtype).permute(2, 1, 0)[:40]
        assert kernels.attention(*inputs, transform, 0.125, out=out) is out
        assert torch.equal(out, want.to(dtype))


def test_padding_is_skipped_and_other_tokens_stay(kernels):
    case = make_case([40], [40], 16)
    transform = calibrated(FMT, SIZE)
    key, value = torch.randn(40, KV_HEADS, SIZE), torch.randn(40, KV_HEADS, SIZE)
    whole, pieces = (torch.randint(0, 256, poisoned_cache(case, FMT, SIZE).shape, dtype=torch.uint8),) * 2
    pieces = whole.clone()
    kernels.store(key, value, whole, case.slots(), transform)
    for start in (7, 0, 21):  # out of order, and with the other tokens' slots masked
        chosen = (torch.arange(40) >= start) & (torch.arange(40) < {7: 21, 0: 7, 21: 40}[start])
        kernels.store(key, value, pieces, torch.where(chosen, case.slots(), -1), transform)
    assert torch.equal(whole, pieces)


def test_vectors_that_are_not_finite_are_counted_and_become_zero(kernels):
    case = make_case([16], [1], 16)
    transform = calibrated(FMT, SIZE)
    key, value = torch.randn(16, KV_HEADS, SIZE), torch.randn(16, KV_HEADS, SIZE)
    key[3, 0, 5], key[4, 1, 0], value[5, 1, 63] = math.nan, math.inf, -math.inf
    cache = poisoned_cache(case, FMT, SIZE)
    pool = HotPool(*(torch.ones(1, KV_HEADS, 16, SIZE, dtype=torch.bfloat16) for _ in range(2)), None)
    assert kernels.store(key, value, cache, case.slots(), transform, pool, torch.arange(16)) == 3
    expected = poisoned_cache(case, FMT, SIZE)
    assert reference.store(key, value, expected, case.slots(), FMT, transform) == 3
    selfcheck.compare_codes(cache, expected, FMT, SIZE)
    assert pool.key.isfinite().all() and pool.value.isfinite().all()
    query = torch.randn(1, HEADS, SIZE)
    out = kernels.attention(query, cache, case.block_table, case.seq_lens, case.query_start_loc, transform, 0.1)
    assert out.isfinite().all()


def test_what_it_refuses(kernels):
    case = make_case([40], [2], 16)
    transform = calibrated(FMT, SIZE)
    cache = poisoned_cache(case, FMT, SIZE)
    key, query = torch.randn(40, KV_HEADS, SIZE), torch.randn(2, HEADS, SIZE)
    slots, table, lengths, starts = case.slots(), case.block_table, case.seq_lens, case.query_start_loc
    with pytest.raises(IndexError, match=r"slot_mapping\[39\]: 5000 of"):
        kernels.store(key, key, cache, torch.where(torch.arange(40) == 39, 5000, slots), transform)
    with pytest.raises(ValueError, match=r"slot_mapping: torch.int32"):
        kernels.store(key, key, cache, slots.int(), transform)
    with pytest.raises(ValueError, match=r"key: shape \(40, 2, 32\), expected \[tokens, 2, 64\]"):
        kernels.store(key[..., :32], key, cache, slots, transform)
    with pytest.raises(ValueError, match=r"slot_mapping: 40 tokens, but key has 5"):
        kernels.store(key[:5], key, cache, slots, transform)
    with pytest.raises(IndexError, match=r"block_table\[0\]\[1\]: page 999 of 6"):
        bad = table.clone()
        bad[0, 1] = 999
        kernels.attention(query, cache, bad, lengths, starts, transform, 0.1)
    with pytest.raises(IndexError, match=r"seq_lens\[0\]: 400 tokens need more pages"):
        kernels.attention(query, cache, table, lengths + 360, starts, transform, 0.1)
    with pytest.raises(IndexError, match=r"query_start_loc\[0\]: 0 to 3 of 2 tokens"):
        kernels.attention(query, cache, table, lengths, starts + torch.tensor([0, 1]).int(), transform, 0.1)
    with pytest.raises(ValueError, match=r"cache: torch.uint8 of shape .* expected uint8 .*, 52\]"):
        kernels.attention(query, cache[..., :-1], table, lengths, starts, transform, 0.1)
    with pytest.raises(ValueError, match=r"query: torch\.float64"):
        kernels.attention(query.double(), cache, table, lengths, starts, transform, 0.1)
    with pytest.raises(ValueError, match="5 heads are no multiple of the cache's 2"):
        kernels.attention(query[:, :5], cache, table, lengths, starts, transform, 0.1)
    with pytest.raises(ValueError, match="transform: matrices of shape"):
        kernels.attention(query, cache, table, lengths, starts, calibrated(FMT, SIZE, 3), 0.1)
    with pytest.raises(ValueError, match="value side has a mean"):
        side = hadamard_transform(FMT, "value", SIZE, torch.ones(KV_HEADS, SIZE))
        kernels.store(key, key, cache, slots, LayerTransform(transform.key, side))


def test_a_transform_is_prepared_once_and_dropped_with_it(kernels):
    case = make_case([16], [1], 16)
    key = torch.randn(16, KV_HEADS, SIZE)
    before = len(kernels._prepared)
    transform = calibrated(FMT, SIZE)
    for _ in range(2):
        kernels.store(key, key, poisoned_cache(case, FMT, SIZE), case.slots(), transform)
    assert len(kernels._prepared) == before + 1
    del transform
    assert len(kernels._prepared) == before
