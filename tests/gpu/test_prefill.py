"""Prefill on the GPU against the PyTorch reference: what is read back, and attention over it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from support.cases import make_case
from support.decode_cases import Case, make_transform, relative_error
from support.dense_attention import dense_attention
from torch import Tensor

from manthanquant import ops, reference
from manthanquant.chunk import read_prefix
from manthanquant.cuda import prefill
from manthanquant.cuda.prefill import DenseAttention, PrefillAttention, prefix_transform
from manthanquant.formats import PAGED_FORMATS, SUPPORTED_HEAD_SIZES, UNIT_TOKENS, Format, get_paged
from manthanquant.reference import HotPool
from manthanquant.transform import LayerTransform
from manthanquant.vllm_plugin.flash_attention import flash_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

DEVICE = torch.device("cuda")
KINDS = ("hadamard", "gain", "dense")
HALF_ULP = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of a number, at most
# Relative L2 error of attention. Ours: keys, values and the output are rounded once, and once more a block merged.
DEFINITION_BOUND = {torch.bfloat16: 5e-3, torch.float16: 6.5e-4}
FLASH_BOUND = {torch.bfloat16: 6e-3, torch.float16: 1e-3}  # FlashAttention rounds the weights too


@dataclass
class Batch:
    """Chunks over packed prefixes, and the options of one call."""

    format: str = "k42v3"
    head_size: int = 128
    dtype: torch.dtype = torch.bfloat16
    kind: str = "hadamard"
    lengths: tuple[int, ...] = (200, 75, 33, 130)
    new: tuple[int, ...] = (40, 75, 1, 17)
    heads: int = 6
    kv_heads: int = 3
    page_tokens: int = 32
    workspace_tokens: int = 1024
    window: int | None = None
    soft_cap: float | None = None
    sink_tokens: int = 0
    recent_tokens: int = 0
    seed: int = 0

    @property
    def fmt(self) -> Format:
        return get_paged(self.format)


@dataclass
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    cache: Tensor
    block_table: Tensor
    transform: LayerTransform
    hot: HotPool | None
    scale: float
    seq_lens: Tensor
    query_start_loc: Tensor


def make_inputs(batch: Batch) -> Inputs:
    """Random prefixes, stored by the reference among garbage; chunks; and an exact tier that misses some units."""
    generator = torch.Generator(DEVICE).manual_seed(batch.seed)
    random = lambda *shape: torch.randn(*shape, generator=generator, device=DEVICE)
    fmt, size, kv_heads = batch.fmt, batch.head_size, batch.kv_heads
    case = make_case(list(batch.lengths), list(batch.new), batch.page_tokens, batch.seed)
    transform = make_transform(
        Case(format=batch.format, head_size=size, kv_heads=kv_heads, transform=batch.kind, key_mean=True),
        generator,
        "cuda",
    )
    shape = (case.pages, kv_heads, batch.page_tokens, fmt.token_bytes(size))
    cache = torch.randint(0, 256, shape, generator=generator, device=DEVICE, dtype=torch.uint8)
    slots = case.slots().to(DEVICE)
    key, value = (random(len(slots), kv_heads, size) for _ in "kv")
    reference.store(key, value, cache, slots, fmt, transform)
    hot = None
    if batch.sink_tokens or batch.recent_tokens:
        units = case.pages * batch.page_tokens // UNIT_TOKENS
        slot = torch.randperm(units, generator=generator, device=DEVICE).int()
        slot[torch.rand(units, generator=generator, device=DEVICE) < 0.3] = -1
        hot = HotPool(*(random(units, kv_heads, UNIT_TOKENS, size).bfloat16() for _ in "kv"), slot)
    tokens = sum(batch.new)
    query, key, value = (random(tokens, n, size).to(batch.dtype) for n in (batch.heads, kv_heads, kv_heads))
    return Inputs(
        1.5 * query,
        key,
        value,
        cache,
        case.block_table.to(DEVICE),
        transform,
        hot,
        size**-0.5,
        case.seq_lens.to(DEVICE),
        case.query_start_loc.to(DEVICE),
    )


def attention_for(batch: Batch, dense: DenseAttention) -> PrefillAttention:
    return PrefillAttention(
        batch.fmt,
        batch.head_size,
        batch.heads,
        batch.kv_heads,
        dense=dense,
        dtype=batch.dtype,
        max_tokens=sum(batch.new),
        workspace_tokens=batch.workspace_tokens,
        device=DEVICE,
    )


def run(batch: Batch, inputs: Inputs, dense: DenseAttention) -> Tensor:
    """What it leaves unwritten stays NaN."""
    attention = attention_for(batch, dense)
    return attention(
        attention.plan(batch.new, batch.lengths, batch.window),
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.cache,
        inputs.block_table,
        prefix_transform(inputs.transform, batch.fmt, batch.head_size, DEVICE),
        inputs.scale,
        soft_cap=batch.soft_cap,
        hot=inputs.hot,
        sink_tokens=batch.sink_tokens,
        recent_tokens=batch.recent_tokens,
        out=torch.full_like(inputs.query, math.nan),
    )


def expected(batch: Batch, inputs: Inputs) -> Tensor:
    return ops.ReferenceKernels(batch.fmt, None).attention(
        inputs.query,
        inputs.cache,
        inputs.block_table,
        inputs.seq_lens,
        inputs.query_start_loc,
        inputs.transform,
        inputs.scale,
        window=batch.window,
        soft_cap=batch.soft_cap,
        sink_tokens=batch.sink_tokens,
        recent_tokens=batch.recent_tokens,
        hot=inputs.hot,
        chunk=(inputs.key, inputs.value),
        out=torch.zeros(inputs.query.shape, device=DEVICE),
    )


def check(batch: Batch) -> None:
    inputs = make_inputs(batch)
    assert relative_error(run(batch, inputs, dense_attention), expected(batch, inputs)) < DEFINITION_BOUND[batch.dtype]


class Recorder:
    """Stands where dense attention does, and keeps what it is given to read."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, out: Tensor, **_: object) -> Tensor:
        self.keys.append(key.clone())
        self.values.append(value.clone())
        out.zero_()
        return torch.zeros(query.shape[1], query.shape[0], device=query.device)


def check_read(batch: Batch) -> None:
    """One call's keys and values: each request's prefix as the reference reads it, rounded once, then its chunk."""
    inputs, recorder = make_inputs(batch), Recorder()
    run(batch, inputs, recorder)
    (keys,), (values,) = recorder.keys, recorder.values
    first = row = 0
    for request, (length, new) in enumerate(zip(batch.lengths, batch.new)):
        before = length - new
        start = 0 if batch.window is None else max(0, before - batch.window + 1)
        old = [torch.zeros(0, batch.kv_heads, batch.head_size, device=DEVICE)] * 2
        if before > start:
            tier = (inputs.hot, batch.sink_tokens, batch.recent_tokens)
            pages = inputs.block_table[request]
            old = read_prefix(inputs.cache, pages, start, before, batch.fmt, inputs.transform, batch.head_size, *tier)
        sides = (inputs.transform.key, inputs.transform.value)
        for got, want, chunk, side in zip((keys, values), old, (inputs.key, inputs.value), sides):
            exact = len(side.inverse.abs().unique()) <= 2  # one magnitude, and zero between the blocks
            prefix, rest = got[row : row + before - start], got[row + before - start : row + length - start]
            assert torch.equal(rest, chunk[first : first + new])
            # The inverse is itself rounded, to eleven bits: that error goes with the whole vector.
            matrix = 0.0 if exact else 2**-9 * want.norm(dim=-1, keepdim=True) / batch.head_size**0.5
            error = (prefix.float() - want).abs() - HALF_ULP[batch.dtype] * want.abs()
            assert bool((error <= matrix + 2e-6 * want.abs().amax(-1, keepdim=True)).all()), float(error.max())
        first, row = first + new, row + length - start
    assert row == keys.shape[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
@pytest.mark.parametrize("head_size", SUPPORTED_HEAD_SIZES)
@pytest.mark.parametrize("name", PAGED_FORMATS)
def test_the_reference_s_prefix(name: str, head_size: int, dtype: torch.dtype, kind: str) -> None:
    check_read(Batch(format=name, head_size=head_size, dtype=dtype, kind=kind))


@pytest.mark.sanitized
@pytest.mark.parametrize("head_size", SUPPORTED_HEAD_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_without_wgmma(kind: str, head_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What serves every architecture but sm_90."""
    monkeypatch.setattr(prefill, "prefix_extension", partial(prefill.prefix_extension, wgmma=False))
    check_read(Batch(head_size=head_size, kind=kind))


@pytest.mark.sanitized
@pytest.mark.parametrize("window", [None, 1, 2, 30, 100])
@pytest.mark.parametrize("page_tokens", [16, 48, 64])
@pytest.mark.parametrize("exact", [False, True])
def test_windows_pages_and_the_exact_tier(page_tokens: int, window: int | None, exact: bool) -> None:
    tier = {"sink_tokens": 20, "recent_tokens": 70} if exact else {}
    lengths, new = (500, 33, 100, 17, 64), (60, 20, 100, 1, 16)
    check_read(Batch(lengths=lengths, new=new, page_tokens=page_tokens, window=window, **tier))


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
@pytest.mark.parametrize("tier", [{"sink_tokens": 5}, {"recent_tokens": 100}, {"sink_tokens": 4, "recent_tokens": 64}])
def test_exact_copies(tier: dict[str, int], dtype: torch.dtype) -> None:
    check_read(Batch(dtype=dtype, lengths=(500, 90, 40), new=(60, 20, 8), **tier))


@pytest.mark.parametrize("workspace_tokens", [64, 256, 1024])
@pytest.mark.parametrize("window", [None, 20, 90])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_attention_in_one_call_or_in_blocks(workspace_tokens: int, window: int | None, soft_cap: float | None) -> None:
    check(
        Batch(
            lengths=(500, 33, 100, 17, 300),
            new=(60, 20, 100, 1, 30),
            workspace_tokens=workspace_tokens,
            window=window,
            soft_cap=soft_cap,
            sink_tokens=4,
            recent_tokens=64,
        )
    )


@pytest.mark.sanitized
@pytest.mark.parametrize("head_size", SUPPORTED_HEAD_SIZES)
@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
def test_merging_at_every_head_size(head_size: int, dtype: torch.dtype) -> None:
    check(Batch(head_size=head_size, dtype=dtype, lengths=(300,), new=(37,), workspace_tokens=112))


def test_any_strides() -> None:
    batch = Batch(kind="gain", lengths=(100, 70), new=(30, 20))
    inputs = make_inputs(batch)
    want = run(batch, inputs, dense_attention)
    # As a projection makes them: queries, keys and values of a token in one row; and a cache with heads outermost.
    row = torch.cat([inputs.query.flatten(1), inputs.key.flatten(1), inputs.value.flatten(1)], 1)
    widths = [batch.heads * batch.head_size, batch.kv_heads * batch.head_size, batch.kv_heads * batch.head_size]
    inputs.query, inputs.key, inputs.value = (x.unflatten(1, (-1, batch.head_size)) for x in row.split(widths, 1))
    inputs.cache = inputs.cache.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(run(batch, inputs, dense_attention), want)
    inputs.key = torch.cat([inputs.key.flatten(), inputs.key.new_zeros(1)]).roll(1)[1:].view(inputs.key.shape)
    assert inputs.key.data_ptr() % 16
    assert torch.equal(run(batch, inputs, dense_attention), want)


def test_arguments_are_checked_by_name() -> None:
    batch = Batch()
    inputs = make_inputs(batch)
    with pytest.raises(ValueError, match=r"query: torch\.float16"):
        run(batch, Inputs(**vars(inputs) | {"query": inputs.query.half()}), dense_attention)
    with pytest.raises(ValueError, match=r"value: .*need torch\.bfloat16 \[at least 133, 3, 128\]"):
        run(batch, Inputs(**vars(inputs) | {"value": inputs.value[1:]}), dense_attention)
    with pytest.raises(ValueError, match=r"block_table: torch\.int64"):
        run(batch, Inputs(**vars(inputs) | {"block_table": inputs.block_table.long()}), dense_attention)
    with pytest.raises(ValueError, match=r"cache: .*need 3 heads"):
        run(batch, Inputs(**vars(inputs) | {"cache": inputs.cache[:, :2]}), dense_attention)
    with pytest.raises(ValueError, match="block_table: 2 rows for 4 requests"):
        run(batch, Inputs(**vars(inputs) | {"block_table": inputs.block_table[:2]}), dense_attention)


def test_torch_compile_sees_one_operator_a_launch() -> None:
    batch = Batch(lengths=(500,), new=(60,), workspace_tokens=256)
    inputs = make_inputs(batch)
    attention = attention_for(batch, dense_attention)
    plan = attention.plan(batch.new, batch.lengths)
    layer = prefix_transform(inputs.transform, batch.fmt, batch.head_size, DEVICE)

    def step(query: Tensor) -> Tensor:
        rest = (inputs.key, inputs.value, inputs.cache, inputs.block_table, layer, inputs.scale)
        return attention(plan, query, *rest)

    compiled = torch.compile(step, backend="aot_eager")(inputs.query)
    assert torch.equal(compiled, step(inputs.query))


@pytest.fixture(scope="module")
def flash() -> DenseAttention:
    try:
        return flash_attention(DEVICE)
    except RuntimeError as error:
        pytest.skip(str(error))


OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "fp16": {"dtype": torch.float16},
    "blocks": {"workspace_tokens": 512},
    "window": {"window": 150},
    "window over blocks": {"window": 900, "workspace_tokens": 512},
    "soft cap": {"soft_cap": 8.0},
    "soft cap over blocks": {"soft_cap": 8.0, "workspace_tokens": 512},
    "exact tier": {"sink_tokens": 4, "recent_tokens": 128},
    "gain": {"kind": "gain", "workspace_tokens": 512},
    "dense": {"kind": "dense"},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_flash_attention(option: str, flash: DenseAttention) -> None:
    batch = Batch(lengths=(2000, 300, 33, 700), new=(300, 300, 33, 1), heads=8, kv_heads=2, workspace_tokens=4096)
    batch = Batch(**vars(batch) | OPTIONS[option])
    inputs = make_inputs(batch)
    assert relative_error(run(batch, inputs, flash), expected(batch, inputs)) < FLASH_BOUND[batch.dtype]


@pytest.mark.parametrize("head_size", SUPPORTED_HEAD_SIZES)
def test_flash_attention_head_sizes(head_size: int, flash: DenseAttention) -> None:
    batch = Batch(head_size=head_size, lengths=(900, 120), new=(200, 100), workspace_tokens=512)
    inputs = make_inputs(batch)
    assert relative_error(run(batch, inputs, flash), expected(batch, inputs)) < FLASH_BOUND[batch.dtype]


@pytest.mark.parametrize("workspace_tokens", [256, 4096])
def test_what_is_not_finite_stays_in_its_request(workspace_tokens: int, flash: DenseAttention) -> None:
    batch = Batch(lengths=(300, 400, 170), new=(65, 70, 40), workspace_tokens=workspace_tokens)
    inputs = make_inputs(batch)
    want = run(batch, inputs, flash)
    bad = slice(65, 65 + 70)
    inputs.key[bad], inputs.value[bad] = math.nan, math.inf
    got = run(batch, inputs, flash)
    others = [*range(65), *range(135, 175)]
    assert torch.equal(got[others], want[others])
    assert not bool(got[bad].isfinite().any())
