"""Decode attention on the GPU against the PyTorch reference, over every format, shape and option."""

from __future__ import annotations

import random

import pytest
import torch
from support.decode_cases import Case, Inputs, expected, make_inputs, relative_error

from manthanquant import reference
from manthanquant.cuda import decode
from manthanquant.cuda.decode import ERROR_BOUND, DecodeAttention, decode_transform
from manthanquant.formats import PAGED_FORMATS, SUPPORTED_HEAD_SIZES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

DEVICE = torch.device("cuda")
LENGTHS = (1, 17, 64, 100, 513, 2000)  # one token, a unit's end, a block's end, several blocks, several teams
RAGGED = (3000, 1, 2, 15, 16, 63, 65, 5000)
KEYS_DENSE, VALUES_DENSE = ("dense", "hadamard"), ("hadamard", "dense")
EXACT = {"sink_tokens": 4, "recent_tokens": 128, "lengths": LENGTHS}


def attention_for(case: Case) -> DecodeAttention:
    return DecodeAttention(
        case.fmt,
        case.head_size,
        case.heads,
        case.kv_heads,
        max_requests=len(case.lengths),
        query_tokens=case.query_tokens,
        exact=case.exact,
        bulk_copy=False if case.cp_async else None,
        device=DEVICE,
    )


def run(case: Case, inputs: Inputs, attention: DecodeAttention | None = None) -> torch.Tensor:
    """The kernel's answer in fp32; what it leaves unwritten stays NaN."""
    attention = attention or attention_for(case)
    transform = decode_transform(inputs.transform, case.fmt, case.head_size, DEVICE)
    out = torch.full(inputs.query.shape, torch.nan, device=DEVICE)
    return attention(
        inputs.query,
        inputs.cache,
        inputs.block_table,
        inputs.seq_lens,
        transform,
        inputs.scale,
        hot=inputs.hot,
        query_start_loc=None if case.new is None else inputs.query_start_loc,
        out=out,
        **inputs.options,
    )


def check(case: Case) -> None:
    inputs = make_inputs(case)
    assert relative_error(run(case, inputs), expected(case, inputs)) < ERROR_BOUND


@pytest.mark.sanitized
@pytest.mark.parametrize("head_size", SUPPORTED_HEAD_SIZES)
@pytest.mark.parametrize("name", PAGED_FORMATS)
def test_formats_and_head_sizes(name: str, head_size: int) -> None:
    check(Case(format=name, head_size=head_size))


@pytest.mark.parametrize("heads", [2, 4, 6, 10, 16, 18, 32, 40])
@pytest.mark.parametrize("name", ["k3v3", "k42v42"])
def test_groups(name: str, heads: int) -> None:
    check(Case(format=name, heads=heads, lengths=(300, 1, 70)))


@pytest.mark.parametrize("head_size", SUPPORTED_HEAD_SIZES)
def test_groups_of_sixteen(head_size: int) -> None:
    check(Case(format="k42v3", head_size=head_size, heads=32, lengths=(300, 1, 70)))


@pytest.mark.sanitized
@pytest.mark.parametrize("page_tokens", [16, 48, 64, 128])
@pytest.mark.parametrize("cp_async", [False, True])
def test_page_sizes_on_both_copy_paths(page_tokens: int, cp_async: bool) -> None:
    check(Case(format="k42v3", page_tokens=page_tokens, lengths=RAGGED, cp_async=cp_async))


@pytest.mark.sanitized
@pytest.mark.parametrize("kind", ["hadamard", "gain", "dense", KEYS_DENSE, VALUES_DENSE], ids=str)
@pytest.mark.parametrize("key_mean", [False, True])
def test_transforms(kind: str | tuple[str, str], key_mean: bool) -> None:
    check(Case(format="k42v42", transform=kind, key_mean=key_mean))


@pytest.mark.parametrize("head_size", [80, 256])
def test_dense_transforms_of_other_head_sizes(head_size: int) -> None:
    check(Case(format="k42v42", head_size=head_size, heads=16, transform="dense", lengths=(300, 1, 70)))


@pytest.mark.parametrize("transform", ["hadamard", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_query_dtypes(dtype: torch.dtype, transform: str) -> None:
    check(Case(dtype=dtype, transform=transform))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_dtypes_only_round(dtype: torch.dtype) -> None:
    case = Case(format="k42v3", dtype=dtype)
    inputs, attention = make_inputs(case), attention_for(case)
    transform = decode_transform(inputs.transform, case.fmt, case.head_size, DEVICE)
    out = attention(inputs.query, inputs.cache, inputs.block_table, inputs.seq_lens, transform, inputs.scale)
    assert torch.equal(out, run(case, inputs, attention).to(dtype))


@pytest.mark.parametrize("window", [1, 40, 100, 1000])
def test_sliding_window(window: int) -> None:
    check(Case(window=window, lengths=(1, 50, 100, 101, 1000, 4097)))


@pytest.mark.parametrize("key_mean", [False, True])
def test_soft_cap(key_mean: bool) -> None:
    check(Case(format="k42v42", soft_cap=5.0, key_mean=key_mean))


@pytest.mark.parametrize(("query_tokens", "heads", "window"), [(2, 4, None), (3, 8, None), (5, 4, 40)])
def test_several_query_tokens_are_causal(query_tokens: int, heads: int, window: int | None) -> None:
    check(Case(query_tokens=query_tokens, heads=heads, window=window, lengths=(5, 17, 64, 700)))


@pytest.mark.sanitized
@pytest.mark.parametrize(
    "options",
    [
        {"heads": 8},  # one row tile of 16 at most
        {"heads": 2, "kv_heads": 1, "window": 50},
        {"heads": 16, "format": "k42v42", "transform": "dense"},  # up to two
        {"heads": 8, "format": "k42v3", "transform": "gain", "key_mean": True, "sink_tokens": 4, "recent_tokens": 128},
    ],
)
def test_requests_with_different_numbers_of_new_tokens(options: dict) -> None:
    check(Case(query_tokens=4, new=(1, 4, 0, 2, 3, 1, 0), lengths=(1, 17, 40, 64, 700, 2000, 5), **options))


@pytest.mark.sanitized
@pytest.mark.parametrize("team", ["LARGE_TEAM", "MEDIUM_TEAM", "SMALL_TEAM"])
@pytest.mark.parametrize(
    "options",
    [
        {"lengths": RAGGED},
        {"lengths": tuple(range(1, 301)), "heads": 4},  # several pairs a team, one after the other
        {"lengths": tuple(range(1, 301)), "heads": 4, "format": "k42v42", "transform": "dense"},
        {"lengths": RAGGED, "format": "k42v42", "transform": "dense", "key_mean": True, "soft_cap": 9.0},
        {**EXACT, "lengths": tuple(range(1, 3000, 20)), "format": "k42v3", "transform": "gain", "key_mean": True},
        {**EXACT, "lengths": tuple(range(1, 3000, 20)), "format": "k42v3", "transform": "dense", "key_mean": True},
    ],
)
def test_team_sizes(monkeypatch: pytest.MonkeyPatch, options: dict, team: str) -> None:
    monkeypatch.setattr(decode, "_team_warps", lambda build, pairs: getattr(build, team))
    check(Case(**options))


def test_requests_without_new_tokens_alone() -> None:
    check(Case(query_tokens=2, new=(0,) * 40 + (1,), lengths=(100,) * 41))


def test_padded_requests_give_zeros() -> None:
    check(Case(lengths=(0, 5, 0, 100)))


def test_longest_sequence() -> None:
    check(Case(lengths=(20000, 131072, 7), heads=4, kv_heads=1))


@pytest.mark.sanitized
@pytest.mark.parametrize("hot_missing", [0.0, 0.3, 1.0])
def test_exact_tier(hot_missing: float) -> None:
    check(Case(hot_missing=hot_missing, **EXACT))


@pytest.mark.parametrize(
    "options",
    [
        {"format": "k42v3", "transform": "gain", "key_mean": True},
        {"format": "k42v42", "transform": "dense", "key_mean": True, "heads": 16, "soft_cap": 7.0, "window": 300},
        {"format": "k42v3", "head_size": 80, "query_tokens": 2, "lengths": (2, 17, 64, 2000), "key_mean": True},
        {"head_size": 256, "heads": 16, "dtype": torch.float16},
        {"format": "k42v3", "cp_async": True, "page_tokens": 16},
        {"heads": 32, "window": 200, "hot_missing": 0.0},
        {"format": "k42v3", "transform": KEYS_DENSE},
        {"format": "k42v3", "transform": VALUES_DENSE, "key_mean": True},
    ],
)
def test_exact_tier_with_everything(options: dict) -> None:
    check(Case(**{**EXACT, **options}))


@pytest.mark.parametrize("soft_cap", [None, 9.0])
def test_learned_sinks(soft_cap: float | None) -> None:
    case = Case(format="k42v3", key_mean=True, transform="gain", soft_cap=soft_cap)
    inputs = make_inputs(case)
    logits = torch.linspace(-2, 6, case.heads, device=DEVICE)
    inputs.options["sink_logits"] = logits
    actual = run(case, inputs)
    del inputs.options["sink_logits"]
    # Attention with a sink is attention without it, times exp(lse) / (exp(lse) + exp(sink)).
    plain = expected(case, inputs)
    share = sink_share(case, inputs, logits)
    assert relative_error(actual, plain * share[..., None]) < ERROR_BOUND


def sink_share(case: Case, inputs: Inputs, logits: torch.Tensor) -> torch.Tensor:
    """The probability mass of the keys, `[requests, heads]`, by dequantised scores."""
    rows = []
    for row, length in enumerate(case.lengths):
        keys = reference.read(inputs.cache, inputs.block_table[row], length, case.fmt, "key", case.head_size)
        turned = inputs.transform.key.apply_to_query(inputs.query[row : row + 1])[0]
        grouped = turned.view(case.kv_heads, -1, case.head_size)
        scores = torch.einsum("hgd,lhd->hgl", grouped, keys).reshape(case.heads, length) * inputs.scale
        mean = inputs.transform.key.mean.repeat_interleave(case.heads // case.kv_heads, 0)
        scores += (inputs.query[row].float() * mean).sum(-1, keepdim=True) * inputs.scale
        if case.soft_cap is not None:
            scores = case.soft_cap * (scores / case.soft_cap).tanh()
        rows.append(torch.sigmoid(scores.logsumexp(-1) - logits))
    return torch.stack(rows)


@pytest.mark.parametrize("seed", range(12))
def test_fuzz(seed: int) -> None:
    """Random lengths, tables, windows and tiers, over builds that other tests need anyway."""
    rng = random.Random(seed)
    exact = seed % 3 == 0
    check(
        Case(
            format="k42v3" if exact else rng.choice(["k3v3", "k42v42"]),
            transform="gain" if exact else "hadamard",
            lengths=tuple(rng.randint(1, 3000) for _ in range(rng.randint(1, 40))),
            page_tokens=rng.choice([16, 32, 64, 80]),
            window=rng.choice([None, None, rng.randint(1, 2000)]),
            sink_tokens=rng.choice([1, 4, 20]) if exact else 0,
            recent_tokens=rng.choice([0, 50, 128, 500]) if exact else 0,
            key_mean=rng.random() < 0.5,
            seed=seed,
        )
    )


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_non_finite_queries_stay_in_their_row(poison: float) -> None:
    case = Case(format="k42v3", lengths=(100, 200, 300))
    inputs = make_inputs(case)
    clean = run(case, inputs)
    inputs.query[1, 2, 5] = poison
    poisoned = run(case, inputs)
    assert poisoned[1, 2].isnan().all()
    poisoned[1, 2] = clean[1, 2]
    assert torch.equal(poisoned, clean)


@pytest.mark.parametrize("exact", [False, True])
def test_graph_replays_are_equal_at_lengths_it_was_not_captured_for(exact: bool) -> None:
    case = Case(lengths=(2000,) * 24, **({"sink_tokens": 4, "recent_tokens": 128} if exact else {}))
    inputs, attention = make_inputs(case), attention_for(case)
    transform = decode_transform(inputs.transform, case.fmt, case.head_size, DEVICE)
    out = torch.empty_like(inputs.query)

    def call() -> None:
        attention(
            inputs.query,
            inputs.cache,
            inputs.block_table,
            inputs.seq_lens,
            transform,
            inputs.scale,
            hot=inputs.hot,
            out=out,
            sink_tokens=case.sink_tokens,
            recent_tokens=case.recent_tokens,
        )

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for seed in range(4):
        torch.manual_seed(seed)
        inputs.seq_lens.copy_(torch.randint(1, 2001, (24,)))
        call()
        eager = out.clone()
        for _ in range(100):
            out.fill_(torch.nan)
            graph.replay()
            assert torch.equal(out, eager)


def test_torch_compile_sees_one_operator() -> None:
    case = Case(format="k42v3", transform="gain")
    inputs, attention = make_inputs(case), attention_for(case)
    transform = decode_transform(inputs.transform, case.fmt, case.head_size, DEVICE)

    def step(query: torch.Tensor) -> torch.Tensor:
        out = attention(query * 2, inputs.cache, inputs.block_table, inputs.seq_lens, transform, inputs.scale)
        return out + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs.query), step(inputs.query))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: {"query": i.query[:, :4]}, "query"),
        (lambda i: {"cache": i.cache[:, :1]}, "cache"),
        (lambda i: {"block_table": i.block_table.long()}, "block_table"),
        (lambda i: {"seq_lens": i.seq_lens[:2]}, "block_table"),
        (lambda i: {"query": i.query[:3]}, "query"),
        (lambda i: {"query_start_loc": i.query_start_loc[:3]}, "query_start_loc"),
    ],
)
def test_bad_arguments_are_named(change, message: str) -> None:
    case = Case()
    inputs = make_inputs(case)
    arguments = {name: getattr(inputs, name) for name in ("query", "cache", "block_table", "seq_lens", "scale")}
    transform = decode_transform(inputs.transform, case.fmt, case.head_size, DEVICE)
    with pytest.raises(ValueError, match=f"^{message}"):
        attention_for(case)(**{**arguments, **change(inputs)}, transform=transform)
