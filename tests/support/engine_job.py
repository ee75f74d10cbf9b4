"""vLLM in one process of its own: a job as JSON on stdin, the result as the last line on stdout.

A job names the settings, the engine's arguments, and rounds of prompts; the rounds run one after the other in the same
engine, the prompts of a round together. One process an engine keeps tests apart: vLLM keeps state in globals.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]


class Output(NamedTuple):
    """One request: generated ids and their logprobs, logprobs of the prompt's tokens from the second on, and how many
    of the prompt's tokens came from the prefix cache."""

    ids: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]
    cached: int


class Result(NamedTuple):
    rounds: list[list[Output]]
    capacity_tokens: int
    preemptions: int
    snapshot: dict[str, Any]


def run(settings: dict[str, str], engine: dict[str, Any], rounds: list[dict[str, Any]]) -> Result:
    """Runs a job. `settings` is environment; a round has `prompts` (lists of token ids) and `sampling`."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MANTHANQUANT_")} | settings
    environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "",  # no entry points: the job registers the plug-in itself, installed or not
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps({"engine": engine, "rounds": rounds}),
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    if done.returncode:
        raise AssertionError(f"the engine failed ({done.returncode}):\n{done.stderr[-3000:]}{done.stdout[-3000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return Result(
        [[Output(*output) for output in outputs] for outputs in answer["rounds"]],
        answer["capacity_tokens"],
        answer["preemptions"],
        answer["snapshot"],
    )


def _output(request: Any) -> Output:
    generated = request.outputs[0]
    given = request.prompt_logprobs or []
    return Output(
        list(generated.token_ids),
        [step[token].logprob for step, token in zip(generated.logprobs or [], generated.token_ids)],
        [step[token].logprob for step, token in zip(given[1:], request.prompt_token_ids[1:])],
        request.num_cached_tokens or 0,
    )


def main() -> None:
    job = json.load(sys.stdin)
    from vllm import LLM, SamplingParams

    from manthanquant.vllm_plugin import WORKER_EXTENSION, register

    register()
    llm = LLM(
        enforce_eager=True,
        distributed_executor_backend="uni",
        worker_extension_cls=WORKER_EXTENSION,
        disable_log_stats=False,
        **job["engine"],
    )
    rounds = []
    for batch in job["rounds"]:
        prompts = [{"prompt_token_ids": ids} for ids in batch["prompts"]]
        outputs = llm.generate(prompts, SamplingParams(**batch["sampling"]), use_tqdm=False)
        rounds.append([_output(request) for request in outputs])
    preemptions = sum(int(m.value) for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    (snapshot,) = llm.collective_rpc("manthanquant_snapshot")
    capacity = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    print(json.dumps({"rounds": rounds, "capacity_tokens": capacity, "preemptions": preemptions, "snapshot": snapshot}))


if __name__ == "__main__":
    main()
