"""The plug-in inside vLLM, on a real model: capacity, and each logprob against the same cache in transformers.

Logprobs are compared in fp32 and teacher-forced, not as text: one rounding that differs flips a code, and every later
token sees it. In bulk the two must agree far better than the format's own error.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support import engine_job
from support.engine_job import Output, Result
from support.models import small_model, windowed_model

from manthanquant import contract, formats

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

PROMPT, NEW, CHUNK, RECENT, SINKS = 400, 16, 128, 32, 4
COMPRESSED = {
    contract.ENV_MODE: "compressed",
    contract.ENV_RECENT_TOKENS: str(RECENT),
    contract.ENV_SINK_TOKENS: str(SINKS),
}
GREEDY = {"temperature": 0, "logprobs": 0, "ignore_eos": True}
PAGE_TOKENS = 128


def text_ids(path: Path, count: int, first: int = 0) -> list[int]:
    from transformers import AutoTokenizer

    text = Path(__file__).parents[3].joinpath("LICENSE").read_text()
    ids: list[int] = AutoTokenizer.from_pretrained(path)(text)["input_ids"][first : first + count]
    assert len(ids) == count
    return ids


def engine(path: Path, **more: Any) -> dict[str, Any]:
    own = {"model": str(path), "max_model_len": 1024, "max_num_seqs": 4, "kv_cache_memory_bytes": 1 << 26}
    return own | {"max_num_batched_tokens": CHUNK, "dtype": "float32"} | more


@cache
def served(path: Path, *settings: tuple[str, str]) -> tuple[list[int], Result]:
    """One request: a prompt in chunks, with its logprobs, then greedy tokens. Returns the prompt and the result."""
    ids = text_ids(path, PROMPT)
    sampling = GREEDY | {"max_tokens": NEW, "prompt_logprobs": 0}
    result = engine_job.run(dict(settings), engine(path), [{"prompts": [ids], "sampling": sampling}])
    return ids, result


def compare(path: Path, settings: dict[str, str], fmt: formats.Format, **oracle: Any) -> None:
    """Engine against oracle; and the oracle's own error, against which the difference must be small."""
    from support.hf_oracle import Oracle, pairs

    ids, result = served(path, *settings.items())
    ((output,),) = result.rounds
    ids = ids + output.ids
    found = torch.tensor(output.prompt_logprobs + output.logprobs)
    read = pairs(len(ids), PROMPT, CHUNK, SINKS, RECENT)
    expected = Oracle(path, fmt, **oracle).logprobs(ids, read)
    exact = Oracle(path, None).logprobs(ids, read)
    own = (expected - exact).abs()
    difference = (found - expected).abs()
    assert float(difference[: CHUNK - 1].max()) < 1e-3  # the first chunk reads no code
    later, decoded = slice(CHUNK - 1, PROMPT - 1), slice(PROMPT - 1, None)
    assert float(own[later].mean()) > 0.02  # there is an error to speak of
    assert float(difference[later].mean()) < 0.1 * float(own[later].mean())
    assert float(difference[decoded].mean()) < 0.4 * float(own[later].mean())
    assert abs(float(found.mean() - expected.mean())) < 0.01


def test_logprobs_are_those_of_attention_over_the_dequantised_cache() -> None:
    compare(small_model(), COMPRESSED, formats.K42V3)


def test_statistics_of_that_run() -> None:
    _, result = served(small_model(), *COMPRESSED.items())
    writes = result.snapshot["writes"]
    steps = -(-PROMPT // CHUNK) + NEW - 1
    assert writes["calls"] == 30 * steps
    assert writes["vectors"] == 30 * 3 * 2 * (PROMPT + NEW - 1)
    assert writes["errors"] == 0
    assert 0.95 < writes["key_cosine_sum"] / writes["sampled_keys"] < 0.99
    assert 0.97 < writes["value_cosine_sum"] / writes["sampled_values"] < 0.99
    hot = result.snapshot["hot"]
    assert hot["evictions_in_window"] == 0
    assert 0 < hot["pages_in_use"] <= hot["pages"]
    assert result.snapshot["page_bytes"] <= 1 << 26 < result.snapshot["page_bytes"] * 1.02


def test_sliding_windows() -> None:
    """Gemma 3: five cache groups of sliding layers and one of full ones."""
    compare(windowed_model(), COMPRESSED, formats.K42V3)


def test_skipped_layers_keep_the_engines_cache() -> None:
    skip = (0, 29)
    settings = COMPRESSED | {contract.ENV_SKIP_LAYERS: "0,29"}
    compare(small_model(), settings, formats.K42V3, skip=skip)
    _, result = served(small_model(), *settings.items())
    assert result.snapshot["bytes_per_token"] == 28 * 3 * 52 + 2 * 3 * 2 * 64 * 4


@cache
def generated(*settings: tuple[str, str]) -> Result:
    """Two requests in vLLM's own bf16, eight tokens each."""
    path = small_model()
    prompts = [text_ids(path, 200), text_ids(path, 90, 300)]
    return engine_job.run(
        dict(settings), engine(path, dtype="bfloat16"), [{"prompts": prompts, "sampling": GREEDY | {"max_tokens": 8}}]
    )


def test_the_allocator_gives_as_many_more_tokens_as_the_format_promises() -> None:
    path = small_model()
    exact = generated()
    small = {"prompts": [text_ids(path, 20)], "sampling": GREEDY | {"max_tokens": 1}}
    ours = engine_job.run(COMPRESSED, engine(path, dtype="bfloat16"), [small])
    pages = (1 << 26) // (30 * 3 * 2 * 64 * 2 * PAGE_TOKENS)
    assert exact.capacity_tokens == pages * PAGE_TOKENS
    assert ours.capacity_tokens / exact.capacity_tokens >= 4.9


@pytest.mark.parametrize(("name", "ratio"), [("k42v3", 256 / 52), ("seed3", 256 / 56)])
def test_shadow_serves_what_the_engine_alone_serves_and_measures_the_format(name: str, ratio: float) -> None:
    exact = generated()
    shadow = generated((contract.ENV_MODE, "shadow"), (contract.ENV_FORMAT, name))
    assert shadow.rounds == exact.rounds
    assert shadow.capacity_tokens == exact.capacity_tokens
    writes = shadow.snapshot["writes"]
    assert writes["vectors"] == 30 * 3 * 2 * (290 + 2 * 7)
    assert writes["bytes_uncompressed"] / writes["bytes_compressed"] == pytest.approx(ratio)
    assert 0.9 < writes["key_cosine_sum"] / writes["sampled_keys"] < 0.999
    assert 0 < writes["squared_error"] / writes["squares"] < 0.2
    assert exact.snapshot["writes"]["calls"] == 0


def agreement(outputs: list[Output], again: list[list[Output]], prompts: list[list[int]]) -> float:
    """Mean difference of the generated tokens' logprobs from those of the same tokens, teacher-forced and alone."""
    differences = [
        (torch.tensor(output.logprobs) - torch.tensor(alone.prompt_logprobs[len(prompt) - 1 :])).abs().mean()
        for output, (alone,), prompt in zip(outputs, again, prompts)
    ]
    return float(torch.stack(differences).mean())


def test_pages_stay_right_under_preemption_and_prefix_hits() -> None:
    """More requests than the cache holds, then the same again: preempted and resumed, with pages found again.

    Each prompt nearly fills its last page, so all need a new one soon. A wrong page would cost whole units of logprob;
    which tokens were exact when differs a little from run to run.
    """
    path, count, new = small_model(), 5, 20
    prompts = [text_ids(path, 245, 300 * i) for i in range(count)]
    size = 10 * 30 * 3 * 52 * PAGE_TOKENS  # ten pages: five prompts, and not one token more of each
    busy = {"prompts": prompts, "sampling": GREEDY | {"max_tokens": new}}
    first = engine_job.run(
        COMPRESSED, engine(path, kv_cache_memory_bytes=size, max_num_seqs=5, max_model_len=512), [busy, busy]
    )
    assert first.preemptions > 0
    assert sum(output.cached for output in first.rounds[1]) > 0
    outputs = [output for batch in first.rounds for output in batch]
    alone = {"sampling": GREEDY | {"max_tokens": 1, "prompt_logprobs": 0}}
    right, wrong = prompts * 2, prompts[1:] + prompts + prompts[:1]
    whole = [prompt + output.ids for turn in (right, wrong) for prompt, output in zip(turn, outputs)]
    again = engine_job.run(COMPRESSED, engine(path), [alone | {"prompts": [ids]} for ids in whole]).rounds
    matching = agreement(outputs, again[: len(outputs)], right)
    assert matching < 0.4 * agreement(outputs, again[len(outputs) :], wrong)  # as if all pages were another's
    assert matching < 0.6
    assert all(math.isfinite(x) for output in outputs for x in output.logprobs)
