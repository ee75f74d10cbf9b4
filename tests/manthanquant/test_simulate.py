from __future__ import annotations

import pytest
import torch
from support.cases import Case

from manthanquant import formats, reference
from manthanquant.codebook import lloyd_max
from manthanquant.formats import UNIT_TOKENS
from manthanquant.hf import AttentionCall, exact_attention
from manthanquant.hot import HotTable
from manthanquant.reference import HotPool
from manthanquant.simulate import (
    TURBOQUANT_PRESETS,
    coded_cache,
    fp8_cache,
    min_max,
    norm_corrected,
    seed_cache,
    turboquant_caches,
)
from manthanquant.transform import LayerTransform, gain_transform, hadamard_transform

SIZE, HEADS, KV_HEADS = 64, 4, 2


def _call(length: int, *, window: int | None = None, soft_cap: float | None = None, layer: int = 0) -> AttentionCall:
    generator = torch.Generator().manual_seed(21)
    shapes = [(n, length, SIZE) for n in (HEADS, KV_HEADS, KV_HEADS)]
    # bf16 values, as the engine hands them over, so that the hot pool's copies are exact
    query, key, value = (torch.randn(s, generator=generator).bfloat16().float() for s in shapes)
    return AttentionCall(layer, query, key, value, 0.25, window, soft_cap, None)


def _transform(fmt: formats.Format) -> LayerTransform:
    generator = torch.Generator().manual_seed(22)
    order = torch.stack([torch.randperm(SIZE, generator=generator) for _ in range(KV_HEADS)])
    gain, mean = torch.rand(2, KV_HEADS, SIZE, generator=generator) + 0.5
    return LayerTransform(gain_transform(fmt, "key", order, gain, mean), hadamard_transform(fmt, "value", SIZE))


def _served(call: AttentionCall, fmt: formats.Format, transform: LayerTransform, sinks: int, recent: int):
    """What the product's reference serves, token by token, from pages and a hot pool."""
    length, pages, page_tokens = call.query.shape[1], -(-call.query.shape[1] // 32), 32
    cache = torch.zeros(pages, KV_HEADS, page_tokens, fmt.token_bytes(SIZE), dtype=torch.uint8)
    table, slots = torch.arange(pages, dtype=torch.int32)[None], pages * page_tokens // UNIT_TOKENS
    hot_table = HotTable(slots, slots, page_tokens, recent, sinks)
    pool = torch.zeros(2, slots, KV_HEADS, UNIT_TOKENS, SIZE, dtype=torch.bfloat16)
    out = []
    for token in range(length):
        case = Case([token + 1], [1], table, pages, page_tokens)
        slot = torch.tensor([token])
        copies = hot_table.update(slot, table, case.seq_lens, case.query_start_loc)
        hot = HotPool(pool[0], pool[1], hot_table.slot)
        new = (call.key[:, token][None], call.value[:, token][None])
        reference.store(*new, cache, slot, fmt, transform, hot, copies)
        query = call.query[:, token][None]
        tiers = {"sink_tokens": sinks, "recent_tokens": recent, "hot": hot}
        out.append(
            reference.attention(
                query,
                cache,
                table,
                case.seq_lens,
                case.query_start_loc,
                fmt,
                transform,
                call.scale,
                window=call.window,
                soft_cap=call.soft_cap,
                **tiers,
            )[0]
        )
    return torch.stack(out, 1)


@pytest.mark.parametrize(
    "sinks, recent, window, soft_cap",
    [(4, 24, None, None), (0, 32, None, None), (17, 0, None, None), (4, 24, 40, None), (4, 24, None, 3.0)],
)
def test_a_simulated_cache_is_what_the_product_serves(sinks, recent, window, soft_cap):
    call = _call(100, window=window, soft_cap=soft_cap)
    transform = _transform(formats.K42V3)
    cache = coded_cache("ours", formats.K42V3, lambda layer, size: transform, sinks, recent)
    served = _served(call, formats.K42V3, transform, sinks, recent)
    simulated = cache.attention(call)
    assert torch.allclose(simulated, served, atol=2e-4)
    assert not torch.allclose(simulated, exact_attention(call), atol=1e-2)


def test_a_window_as_long_as_the_text_is_exact():
    call = _call(90)
    cache = coded_cache("ours", formats.K3V3, lambda layer, size: _transform(formats.K3V3), 0, 96)
    assert torch.allclose(cache.attention(call), exact_attention(call), atol=1e-5)


def test_fp8_holds_e4m3_values_and_saturates():
    x = torch.tensor([[[1.0, 1.05, 1.07, 500.0, -1e4]]])
    back = fp8_cache().code(AttentionCall(0, x, x, x, 1.0, None, None, None))[0]
    assert back.tolist() == [[[1.0, 1.0, 1.125, 448.0, -448.0]]]


@pytest.mark.parametrize("bits", [3, 4])
def test_min_max_keeps_the_ends_and_errs_by_half_a_step_at_most(bits):
    x = torch.randn(2, 50, SIZE, generator=torch.Generator().manual_seed(1))
    back = min_max(x, bits)
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / (2**bits - 1)
    assert bool(((back - x).abs() <= step * 0.51 + 4e-3).all())
    assert len(back[0, 0].unique()) <= 2**bits
    assert torch.allclose(back.amin(-1), x.amin(-1), atol=2e-3)


def test_min_max_of_equal_elements_is_their_value():
    assert torch.allclose(min_max(torch.full((1, 1, 8), 0.5), 3), torch.full((1, 1, 8), 0.5))


@pytest.mark.parametrize("bits", [3, 4])
def test_norm_correction_keeps_the_norm_and_lloyd_max_the_direction(bits):
    x = torch.randn(2, 400, SIZE, generator=torch.Generator().manual_seed(1)) * 3
    back = norm_corrected(x, bits)
    assert torch.allclose(back.norm(dim=-1), x.norm(dim=-1), rtol=1e-3)
    cosine = torch.cosine_similarity(back, x, dim=-1).mean().item()
    levels = torch.tensor(lloyd_max(bits))
    distortion = (torch.randn(200_000)[:, None] - levels).abs().amin(1).square().mean().item()
    assert cosine == pytest.approx((1 - distortion) ** 0.5, abs=2e-3)


def test_the_seeds_cosine():
    x = torch.randn(1, 2000, 128, generator=torch.Generator().manual_seed(1))
    back = seed_cache().code(AttentionCall(0, x, x, x, 1.0, None, None, None))[0]
    assert torch.cosine_similarity(back, x, dim=-1).mean().item() == pytest.approx(0.983, abs=1e-3)


def test_turboquants_end_layers_are_exact_and_its_bytes_are_its_slots():
    caches = {cache.name: cache for cache in turboquant_caches(30)}
    assert [c.removeprefix("turboquant_") for c in caches] == [name for name, *_ in TURBOQUANT_PRESETS]
    assert caches["turboquant_3bit_nc"].exact_layers == {0, 1, 28, 29}
    # vLLM's own slot sizes at head size 128: 48 + 2 + 48 + 4, and so on
    sizes = {name.removeprefix("turboquant_"): cache.pair_bytes(128) for name, cache in caches.items()}
    assert sizes == {"3bit_nc": 102, "k3v4_nc": 118, "4bit_nc": 134, "k8v4": 196}
    first, middle = _call(40, layer=1), _call(40, layer=2)
    cache = caches["turboquant_3bit_nc"]
    assert torch.equal(cache.attention(first), exact_attention(first))
    assert not torch.allclose(cache.attention(middle), exact_attention(middle), atol=1e-2)
