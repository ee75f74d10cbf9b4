"""The CUDA store against the PyTorch reference, byte by byte: same codes but for ties, same scales but for rounding."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from support.cases import make_case

from manthanquant import reference
from manthanquant.codebook import codebook
from manthanquant.cuda import store as gpu
from manthanquant.formats import K3V3, K42V3, PAGED_FORMATS, SIDES, SUPPORTED_HEAD_SIZES, UNIT_TOKENS
from manthanquant.packing import pack_units, pages_as_units, unpack_units
from manthanquant.quantize import scales_to_bytes
from manthanquant.reference import HotPool
from manthanquant.transform import LayerTransform, dense_transform, gain_transform, hadamard_transform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

KV_HEADS = 3
SCALE_STEPS = 1  # of the scale's last bit
DTYPES = [torch.bfloat16, torch.float16]


def transforms(kind, fmt, head_size, seed=0, kv_heads=KV_HEADS):
    generator = torch.Generator().manual_seed(seed)
    mean = 4 * torch.randn(kv_heads, head_size, generator=generator)
    if kind == "hadamard":
        return LayerTransform(*(hadamard_transform(fmt, side, head_size) for side in SIDES))
    if kind == "gain":
        order = torch.stack([torch.randperm(head_size, generator=generator) for _ in range(kv_heads)])
        gain = torch.rand(kv_heads, head_size, generator=generator) + 0.5
        return LayerTransform(
            gain_transform(fmt, "key", order, gain, mean), hadamard_transform(fmt, "value", head_size)
        )
    matrix = torch.randn(2, kv_heads, head_size, head_size, generator=generator) / math.sqrt(head_size)
    matrix += torch.eye(head_size)
    return LayerTransform(dense_transform(fmt, "key", matrix[0], mean), dense_transform(fmt, "value", matrix[1]))


def steps(scale_bytes, fmt, side):
    """Scale bytes as integers that count the scale's last bit, one a class."""
    return scale_bytes.contiguous().view(torch.int16).int() if len(fmt.bits(side)) == 1 else scale_bytes.int()


def check_cache(actual, before, key, value, slots, fmt, transform):
    """`actual` holds the tokens as the reference would store them, ties apart, and nothing else changed."""
    head_size = key.shape[-1]
    expected = before.clone()
    reference.store(key, value, expected, slots, fmt, transform)
    keep = slots >= 0
    kept = slots[keep]
    stored = {}
    for side, x, side_transform in zip(SIDES, (key, value), (transform.key, transform.value)):
        (got, got_scale), (want, want_scale) = (
            unpack_units(pages_as_units(cache, fmt, head_size), fmt, side, head_size) for cache in (actual, expected)
        )
        page, unit, row = kept // actual.shape[2], kept % actual.shape[2] // UNIT_TOKENS, kept % UNIT_TOKENS
        y = side_transform.apply(x[: slots.shape[0]][keep]).double()
        first, scales = 0, []
        for cls, (bits, count) in enumerate(zip(fmt.bits(side), fmt.segments(side, head_size))):
            part = y[..., first : first + count]
            scaled = part * math.sqrt(count) / part.norm(dim=-1, keepdim=True).clamp_min(1e-30)
            near = torch.zeros_like(scaled, dtype=torch.bool)
            for boundary in codebook(bits).boundaries:
                near |= (scaled - boundary).abs() < gpu.tie(boundary)
            a, b = (c[page, :, unit, row][..., first : first + count].int() for c in (got, want))
            # Codes under a scale of zero mean nothing: zero vectors, and those that were not finite.
            zero = steps(want_scale[page, :, unit, row], fmt, side)[..., cls : cls + 1] == 0
            far = ~near & ~zero
            assert torch.equal(a[far], b[far]), f"{side}: {int((a != b)[far].sum())} codes differ away from a tie"
            assert bool(((a - b).abs()[~zero.expand_as(a)] <= 1).all()), f"{side}: a tie differs by more than one code"
            # The scale belongs to the codes that were stored: another code at a tie gives another scale.
            levels = torch.tensor(codebook(bits).levels, dtype=torch.float64, device=y.device)[a]
            scales.append(part.square().sum(-1) / (part * levels).sum(-1).clamp_min(1e-30))
            first += count
        exact = scales_to_bytes(torch.stack(scales, -1).float())
        s, t, w = (steps(c, fmt, side) for c in (got_scale[page, :, unit, row], exact, want_scale[page, :, unit, row]))
        t = torch.where(w == 0, 0, t)
        assert int((s - t).abs().max()) <= SCALE_STEPS, f"{side}: scales differ by {int((s - t).abs().max())} steps"
        stored[side] = (got, got_scale)
    # Put the kernel's own codes through the reference's packing: then every byte, old tokens' too, must be equal.
    units = pages_as_units(expected, fmt, head_size)

    touched = torch.unique(kept // UNIT_TOKENS)
    page, unit = touched // units.shape[2], touched % units.shape[2]
    codes = {side: unpack_units(units[page, :, unit], fmt, side, head_size)[0] for side in SIDES}
    scales = {side: unpack_units(units[page, :, unit], fmt, side, head_size)[1] for side in SIDES}
    place = torch.searchsorted(touched, kept // UNIT_TOKENS)
    for side in SIDES:
        got, got_scale = stored[side]
        where = (kept // actual.shape[2], slice(None), kept % actual.shape[2] // UNIT_TOKENS, kept % UNIT_TOKENS)
        codes[side][place, :, kept % UNIT_TOKENS] = got[where]
        scales[side][place, :, kept % UNIT_TOKENS] = got_scale[where]
    units[page, :, unit] = pack_units(codes, scales, fmt)
    assert torch.equal(actual, expected)


def new_cache(pages, page_tokens, fmt, head_size, kv_heads=KV_HEADS):
    # Stale codes of an earlier owner; whole units of the reference's own making, so that padding bits are zero.
    cache = torch.zeros(pages, kv_heads, page_tokens, fmt.token_bytes(head_size), dtype=torch.uint8, device="cuda")
    tokens = pages * page_tokens
    x = torch.randn(2, tokens, kv_heads, head_size, device="cuda")
    everything = torch.arange(tokens, device="cuda")
    transform = transforms("hadamard", fmt, head_size, kv_heads=kv_heads).to("cuda")
    reference.store(x[0], x[1], cache, everything, fmt, transform)
    return cache


@pytest.mark.parametrize("kind", ["hadamard", "gain", "dense"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", SUPPORTED_HEAD_SIZES)
@pytest.mark.parametrize("fmt", PAGED_FORMATS.values(), ids=lambda f: f.name)
def test_the_reference_s_bytes(fmt, head_size, dtype, kind):
    torch.manual_seed(1)
    case = make_case([1, 100, 16, 47, 33, 5], [1, 100, 16, 40, 1, 5], 64)
    first = [length - new for length, new in zip(case.lengths, case.new)]
    slots = case.slots(first).cuda()
    slots = torch.cat([slots, torch.full((7,), -1, device="cuda")])  # a padded batch
    key, value = (torch.randn(slots.shape[0], KV_HEADS, head_size, device="cuda").to(dtype) for _ in range(2))
    transform = transforms(kind, fmt, head_size).to("cuda")
    cache = new_cache(case.pages, 64, fmt, head_size)
    before = cache.clone()
    prepared = gpu.prepare(transform, fmt, head_size, dtype, torch.device("cuda"))
    gpu.store(key, value, cache, slots, prepared)
    check_cache(cache, before, key, value, slots, fmt, transform)


LARGE = [(fmt, 128, torch.bfloat16) for fmt in PAGED_FORMATS.values()] + [
    (K3V3, 64, torch.bfloat16),
    (K3V3, 128, torch.float16),
    (K42V3, 256, torch.bfloat16),
]


@pytest.mark.sanitized
@pytest.mark.parametrize("kind", ["hadamard", "gain", "dense"])
@pytest.mark.parametrize("fmt,head_size,dtype", LARGE, ids=lambda x: getattr(x, "name", str(x)))
def test_many_tokens(fmt, head_size, dtype, kind):
    """Enough for warpgroups: whole units, ragged ends, single tokens and holes beside each other in one."""
    torch.manual_seed(2)
    kv_heads = 8
    case = make_case([1500, 1, 900, 16, 333, 5], [1500, 1, 890, 16, 300, 5], 64)
    slots = case.slots([length - new for length, new in zip(case.lengths, case.new)]).cuda()
    slots[torch.rand(slots.shape[0], device="cuda") < 0.01] = -1
    key, value = (torch.randn(slots.shape[0], kv_heads, head_size, device="cuda").to(dtype) for _ in SIDES)
    key[700, 1, 3], value[1600:1603] = math.inf, 0.0
    key[1000:1005], value[2000:2005] = key[1000:1005] * 1e-5, value[2000:2005] * 1e4  # beyond fp16, transformed
    transform = transforms(kind, fmt, head_size, kv_heads=kv_heads).to("cuda")
    cache = new_cache(case.pages, 64, fmt, head_size, kv_heads)
    before = cache.clone()
    prepared = gpu.prepare(transform, fmt, head_size, dtype, torch.device("cuda"))
    nonfinite = torch.zeros(1, dtype=torch.int64, device="cuda")
    gpu.store(key, value, cache, slots, prepared, nonfinite=nonfinite)
    check_cache(cache, before, key, value, slots, fmt, transform)
    assert nonfinite.item() == int(slots[700] >= 0)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 257])
@pytest.mark.parametrize("start", [0, 1, 15])
def test_any_chunk_at_any_offset(tokens, start):
    fmt, head_size = K42V3, 128
    torch.manual_seed(tokens)
    transform = transforms("gain", fmt, head_size).to("cuda")
    prepared = gpu.prepare(transform, fmt, head_size, torch.bfloat16, torch.device("cuda"))
    slots = torch.arange(start, start + tokens, device="cuda")
    cache = new_cache(6, 48, fmt, head_size)
    before = cache.clone()
    key, value = (torch.randn(tokens, KV_HEADS, head_size, device="cuda").bfloat16() for _ in range(2))
    gpu.store(key, value, cache, slots, prepared)
    check_cache(cache, before, key, value, slots, fmt, transform)


@pytest.mark.sanitized
@pytest.mark.parametrize(("head_size", "kind"), [(128, "hadamard"), (128, "gain"), (256, "gain"), (256, "dense")])
def test_without_wgmma(head_size, kind, monkeypatch):
    """What serves architectures other than sm_90a, at a size at which that one uses warpgroups."""
    monkeypatch.setattr(gpu, "store_extension", partial(gpu.store_extension, wgmma=False))
    test_many_tokens(K42V3, head_size, torch.bfloat16, kind)


@pytest.mark.sanitized
@pytest.mark.parametrize("tokens", [8, 40, 3000])  # spread thinly, a window a warp, several tiles a warp
@pytest.mark.parametrize("kind", ["hadamard", "gain", "dense"])
def test_scattered_tokens_of_many_heads(tokens, kind):
    """Decode steps: single tokens of many requests, chunks that begin and end anywhere between them."""
    fmt, head_size, kv_heads = K42V3, 128, 8
    torch.manual_seed(tokens)
    units = torch.randperm(6400 // UNIT_TOKENS, device="cuda")[: tokens // UNIT_TOKENS + 2]
    slots = (units[:, None] * UNIT_TOKENS + torch.arange(UNIT_TOKENS, device="cuda")).flatten()[5 : 5 + tokens]
    single = torch.rand(tokens, device="cuda") < 0.1
    slots[single] = slots[single][torch.randperm(int(single.sum()), device="cuda")]
    transform = transforms(kind, fmt, head_size, kv_heads=kv_heads).to("cuda")
    prepared = gpu.prepare(transform, fmt, head_size, torch.bfloat16, torch.device("cuda"))
    cache = new_cache(100, 64, fmt, head_size, kv_heads)
    before = cache.clone()
    key, value = (torch.randn(tokens, kv_heads, head_size, device="cuda").bfloat16() for _ in "kv")
    for _ in range(3):  # one after the other on a stream: a launch may begin before the last has ended
        gpu.store(key, value, cache, slots, prepared)
    check_cache(cache, before, key, value, slots, fmt, transform)


def test_tokens_of_a_unit_in_any_order():
    """The documented fast order is a matter of speed only: shuffled tokens, skipped ones, units interleaved."""
    fmt, head_size = K3V3, 64  # key words mix two tokens here
    torch.manual_seed(0)
    transform = transforms("hadamard", fmt, head_size).to("cuda")
    prepared = gpu.prepare(transform, fmt, head_size, torch.bfloat16, torch.device("cuda"))
    slots = torch.randperm(512, device="cuda")
    slots[torch.rand(512, device="cuda") < 0.2] = -1
    cache = new_cache(8, 64, fmt, head_size)
    before = cache.clone()
    key, value = (torch.randn(512, KV_HEADS, head_size, device="cuda").bfloat16() for _ in range(2))
    gpu.store(key, value, cache, slots, prepared)
    check_cache(cache, before, key, value, slots, fmt, transform)


@pytest.mark.parametrize("layout", ["one tensor", "transposed", "odd offset"])
def test_any_strides(layout):
    fmt, head_size, tokens = K42V3, 128, 80
    torch.manual_seed(3)
    if layout == "one tensor":
        qkv = torch.randn(tokens, (2 + 2) * KV_HEADS * head_size, device="cuda").bfloat16()
        key, value = (
            qkv[:, i * KV_HEADS * head_size : (i + 1) * KV_HEADS * head_size].view(tokens, KV_HEADS, -1) for i in (2, 3)
        )
    elif layout == "transposed":
        key, value = (torch.randn(KV_HEADS, head_size, tokens, device="cuda").bfloat16().permute(2, 0, 1) for _ in "kv")
    else:
        size = tokens * KV_HEADS * head_size
        key, value = (torch.randn(size + 1, device="cuda").bfloat16()[1:].view(tokens, KV_HEADS, -1) for _ in "kv")
    transform = transforms("gain", fmt, head_size).to("cuda")
    prepared = gpu.prepare(transform, fmt, head_size, torch.bfloat16, torch.device("cuda"))
    # The cache as an engine may lay it out: pages apart, heads outermost.
    backing = new_cache(6, 32, fmt, head_size)
    cache = torch.zeros(KV_HEADS, 6, 32, backing.shape[3], dtype=torch.uint8, device="cuda").transpose(0, 1)
    cache.copy_(backing)
    before = cache.clone()
    slots = torch.arange(7, 7 + tokens, device="cuda")
    gpu.store(key, value, cache, slots, prepared)
    check_cache(cache.contiguous(), before.contiguous(), key, value, slots, fmt, transform)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bad_vectors_become_zero_and_spread_nowhere(dtype):
    fmt, head_size, tokens = K42V3, 128, 50
    torch.manual_seed(5)
    transform = transforms("gain", fmt, head_size).to("cuda")
    prepared = gpu.prepare(transform, fmt, head_size, dtype, torch.device("cuda"))
    key, value = (torch.randn(tokens, KV_HEADS, head_size, device="cuda").to(dtype) for _ in "kv")
    key[3, 1, 7], key[20, 0, 0], value[20, 2, 127], value[49, :, 5] = math.nan, math.inf, -math.inf, math.nan
    slots = torch.arange(8, 8 + tokens, device="cuda")
    cache = new_cache(2, 64, fmt, head_size)
    before = cache.clone()
    hot = HotPool(*(torch.full((4, KV_HEADS, 16, head_size), 7.0, device="cuda").bfloat16() for _ in "kv"), None)
    hot_slots = torch.full((tokens,), -1, device="cuda")
    hot_slots[[3, 20]] = torch.tensor([5, 17], device="cuda")
    nonfinite = torch.zeros(1, dtype=torch.int64, device="cuda")
    gpu.store(key, value, cache, slots, prepared, hot, hot_slots, nonfinite)
    assert nonfinite.item() == 3 + KV_HEADS
    check_cache(cache, before, key, value, slots, fmt, transform)
    assert torch.equal(hot.key[0, 1, 5], torch.zeros(head_size, device="cuda").bfloat16())
    assert torch.equal(hot.key[0, 0, 5], key[3, 0].bfloat16())
    assert torch.equal(hot.value[1, 2, 1], torch.zeros(head_size, device="cuda").bfloat16())


@pytest.mark.sanitized
def test_zero_vectors_and_extremes():
    fmt, head_size = K42V3, 128
    transform = transforms("hadamard", fmt, head_size).to("cuda")
    prepared = gpu.prepare(transform, fmt, head_size, torch.bfloat16, torch.device("cuda"))
    size = torch.tensor([0.0, 1e-30, 1e-12, 1e4, 3e6], device="cuda")  # the scale underflows, saturates
    key, value = (torch.randn(5, KV_HEADS, head_size, device="cuda").mul(size[:, None, None]).bfloat16() for _ in "kv")
    slots = torch.arange(5, device="cuda")
    cache = new_cache(1, 16, fmt, head_size)
    before = cache.clone()
    gpu.store(key, value, cache, slots, prepared)
    check_cache(cache, before, key, value, slots, fmt, transform)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hot_copies(dtype):
    fmt, head_size, tokens, slots_in_pool = K3V3, 128, 90, 9
    torch.manual_seed(6)
    transform = transforms("hadamard", fmt, head_size).to("cuda")
    prepared = gpu.prepare(transform, fmt, head_size, dtype, torch.device("cuda"))
    key, value = (torch.randn(tokens, KV_HEADS, head_size, device="cuda").to(dtype) for _ in "kv")
    cache = new_cache(2, 64, fmt, head_size)
    hot_slots = torch.full((tokens,), -1, device="cuda")
    hot_slots[20:70] = torch.randperm(slots_in_pool * UNIT_TOKENS, device="cuda")[:50]
    pools = [torch.randn(slots_in_pool, KV_HEADS, 16, head_size, device="cuda").bfloat16() for _ in "kv"]
    expected = [pool.clone() for pool in pools]
    slots = torch.arange(tokens, device="cuda")
    reference.store(key, value, cache.clone(), slots, fmt, transform, HotPool(*expected, None), hot_slots)
    gpu.store(key, value, cache, slots, prepared, HotPool(*pools, None), hot_slots)
    for pool, want in zip(pools, expected):
        assert torch.equal(pool, want)


def test_a_captured_graph_stores_what_it_is_replayed_with():
    fmt, head_size, tokens = K42V3, 128, 32
    transform = transforms("gain", fmt, head_size).to("cuda")
    prepared = gpu.prepare(transform, fmt, head_size, torch.bfloat16, torch.device("cuda"))
    key, value = (torch.zeros(tokens, KV_HEADS, head_size, device="cuda").bfloat16() for _ in "kv")
    slots = torch.zeros(tokens, dtype=torch.int64, device="cuda")
    cache = new_cache(8, 64, fmt, head_size)
    gpu.store(key, value, cache, slots, prepared)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gpu.store(key, value, cache, slots, prepared)
    for seed in range(3):
        torch.manual_seed(seed)
        key.normal_(), value.normal_(), slots.copy_(torch.randperm(512)[:tokens])
        before = cache.clone()
        graph.replay()
        check_cache(cache, before, key, value, slots, fmt, transform)


def test_torch_compile_sees_one_operator():
    fmt, head_size = K42V3, 128
    transform = transforms("gain", fmt, head_size).to("cuda")
    prepared = gpu.prepare(transform, fmt, head_size, torch.bfloat16, torch.device("cuda"))
    x = torch.randn(20, KV_HEADS, head_size, device="cuda").bfloat16()
    slots = torch.arange(20, device="cuda")
    cache = new_cache(2, 16, fmt, head_size)
    plain = cache.clone()
    gpu.store(x * 2, x + 1, plain, slots, prepared)

    def step(x, cache, slots):
        gpu.store(x * 2, x + 1, cache, slots, prepared)

    torch.compile(step, fullgraph=True, backend="aot_eager")(x, cache, slots)
    assert torch.equal(cache, plain)


def test_arguments_are_checked_by_name():
    fmt, head_size = K42V3, 128
    transform = transforms("hadamard", fmt, head_size).to("cuda")
    prepared = gpu.prepare(transform, fmt, head_size, torch.bfloat16, torch.device("cuda"))
    cache = new_cache(1, 16, fmt, head_size)
    x = torch.zeros(4, KV_HEADS, head_size, device="cuda").bfloat16()
    slots = torch.arange(4, device="cuda")
    with pytest.raises(ValueError, match="key: expected"):
        gpu.store(x.half(), x, cache, slots, prepared)
    with pytest.raises(ValueError, match=r"value: expected .* \[at least 4, 3, 128\]"):
        gpu.store(x, x[:, :2], cache, slots, prepared)
    with pytest.raises(ValueError, match="slot_mapping: expected contiguous int64"):
        gpu.store(x, x, cache, slots.int(), prepared)
    with pytest.raises(ValueError, match="hot_slots: expected int64"):
        gpu.store(x, x, cache, slots, prepared, None, slots)
    with pytest.raises(ValueError, match="is not supported by the GPU store"):
        gpu.prepare(transform, fmt, head_size, torch.float32, torch.device("cuda"))
