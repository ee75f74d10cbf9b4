"""Decode throughput of the whole engine on this machine: our cache beside vLLM's own, in one run.

    python -m manthanquant.bench.engine MODEL [--streams 1 8] [--context 1000] [--tokens 64] [--rounds 3]

Both engines are loaded at once, each in a process of its own, and take turns, so that what else the machine does hits
both. The prompts' pages are in the prefix cache, and the time to the first token is taken off by a second measurement
with one token only; what remains is decoding. Where other work takes the cores away, the wall clock says little: the
second ratio is by the processes' own CPU time (one thread each, so on an idle machine both are the same).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

from manthanquant import contract

CACHE_BYTES = 1 << 29
OURS, ENGINE = "compressed", "off"


@dataclass(frozen=True)
class Row:
    """Decoded tokens a second of all streams, medians over rounds, and ours over the engine's: wall and CPU seconds."""

    streams: int
    ours: float
    engine: float
    ratio: float
    cpu_ratio: float


def _serve(connection: Connection, mode: str, model: str, context: int) -> None:
    """One engine: takes (prompts, tokens) and answers with wall and CPU seconds, until it is told to stop by None."""
    os.environ |= {
        contract.ENV_MODE: mode,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    from vllm import LLM, SamplingParams

    from manthanquant.vllm_plugin import register

    register()
    llm = LLM(
        model=model,
        enforce_eager=True,
        distributed_executor_backend="uni",
        max_model_len=context + 1024,
        max_num_seqs=16,
        kv_cache_memory_bytes=CACHE_BYTES,
    )
    connection.send(llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens)
    while (work := connection.recv()) is not None:
        prompts, tokens = work
        parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        started, cpu = time.perf_counter(), time.process_time()
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
        connection.send((time.perf_counter() - started, time.process_time() - cpu))


class Engine:
    """A process that serves `mode`."""

    def __init__(self, mode: str, model: str, context: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, mode, model, context), daemon=True)
        self._process.start()
        theirs.close()
        self.capacity_tokens: int = self._connection.recv()

    def seconds(self, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, float]:
        self._connection.send((prompts, tokens))
        taken: tuple[float, float] = self._connection.recv()
        return taken

    def decode_rates(self, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, float]:
        """Tokens of all streams after their first, a wall and a CPU second."""
        first, whole = self.seconds(prompts, 1), self.seconds(prompts, tokens)
        count = len(prompts) * (tokens - 1)
        return count / (whole[0] - first[0]), count / (whole[1] - first[1])

    def stop(self) -> None:
        self._connection.send(None)
        self._process.join(30)


def measure(model: str, streams: Sequence[int], context: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Rows a number of streams, and what they were measured with."""
    engines = {mode: Engine(mode, model, context) for mode in (OURS, ENGINE)}
    rows = []
    for count in streams:
        # Streams differ from their first token on, so that none finds another's pages.
        prompts = [
            [1000 + stream, *(2000 + (7 * i + stream) % 997 for i in range(context - 1))] for stream in range(count)
        ]
        for engine in engines.values():
            engine.seconds(prompts, 1)
        rates: dict[str, list[tuple[float, float]]] = {OURS: [], ENGINE: []}
        for turn in range(rounds):
            for mode in (OURS, ENGINE) if turn % 2 else (ENGINE, OURS):
                rates[mode].append(engines[mode].decode_rates(prompts, tokens))
        (ours, ours_cpu), (theirs, theirs_cpu) = (map(statistics.median, zip(*rates[mode])) for mode in (OURS, ENGINE))
        rows.append(Row(count, ours, theirs, ours / theirs, ours_cpu / theirs_cpu))
    capacity = {mode: engine.capacity_tokens for mode, engine in engines.items()}
    for engine in engines.values():
        engine.stop()
    setting = {"model": model, "context": context, "tokens": tokens, "rounds": rounds, "capacity_tokens": capacity}
    return setting | {"rows": [asdict(row) for row in rows]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, default=1000, help="tokens of each prompt (default 1000)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens generated by each stream (default 64)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the result as JSON too")
    args = parser.parse_args()
    result = measure(args.model, args.streams, args.context, args.tokens, args.rounds)
    print(f"{'streams':>8}{'ours tok/s':>12}{'vLLM tok/s':>12}{'ratio':>8}{'by CPU time':>13}")
    for row in result["rows"]:
        print(
            f"{row['streams']:>8}{row['ours']:>12.1f}{row['engine']:>12.1f}{row['ratio']:>8.2f}{row['cpu_ratio']:>13.2f}"
        )
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
