"""`manthanquant quality MODEL`: what a KV cache costs in quality, measured on any text.

A text's last tokens are scored twice by the same fp32 model, with exact attention and with each cache simulated
(`simulate`), every token read as it would be when decoded one at a time. Per scored position:

* KLD: the Kullback-Leibler divergence, in nats, of the next-token distribution from the exact cache's;
* top-1: whether the most likely next token is the same;
* perplexity of the text itself, as a change from the exact cache's.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import inspect
import json
import math
import platform
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manthanquant import calibrate, calibration, formats
from manthanquant.calibration import CalibrationError
from manthanquant.contract import DEFAULT_RECENT_TOKENS, DEFAULT_SINK_TOKENS
from manthanquant.formats import FormatError
from manthanquant.hf import Model, ModelError, exact_attention
from manthanquant.simulate import Cache, coded_cache, fp8_cache, seed_cache, turboquant_caches
from manthanquant.transform import Kind, LayerTransform, default_transform

DEFAULT_CACHES = ("k42v3", "k42v42", "k3v3", "k4v4", "k42v3:hadamard")
DEFAULT_TOKENS = (2048, 5120)
DEFAULT_SCORED = 1024
DEFAULT_MAX_POSITIONS = 8192
MIN_SCORED = 16
_UNCALIBRATED: Kind = "hadamard"
_HEAD_POSITIONS = 128  # scored at a time: a large vocabulary's logits take 1 MB a position
# Long prose in docstrings, present wherever Python is; calibration never sees it.
_DOCUMENTED_MODULES = (
    "doctest", "heapq", "argparse", "pickletools", "difflib", "decimal", "fractions", "statistics", "random", "string",
    "textwrap", "logging", "unittest", "optparse", "zipfile", "tokenize", "typing", "collections", "functools",
)  # fmt: skip


@dataclass(frozen=True)
class Score:
    """One cache on one text; KLD in nats, shares from 0 to 1.

    Attributes:
        kld, kld_error: mean over the scored positions and its standard error (positions taken as independent).
        kld_p99: its 99th percentile.
        top1: share of positions with the same most likely token.
        perplexity: of the text.
        perplexity_change: over the exact cache's, less 1.
    """

    cache: str
    pair_bytes: float
    kld: float
    kld_error: float
    kld_p99: float
    top1: float
    perplexity: float
    perplexity_change: float


@dataclass(frozen=True)
class Run:
    """All scores on one text at one length."""

    text: str
    text_sha256: str
    tokens: int
    scored: int
    exact_perplexity: float
    scores: list[Score]


def standard_library_text() -> str:
    """The default text: docstrings of the standard library, which differ a little between versions of Python."""
    parts = []
    for name in _DOCUMENTED_MODULES:
        module = importlib.import_module(name)
        parts.append(inspect.getdoc(module) or "")
        for member_name in getattr(module, "__all__", ()):
            member = getattr(module, member_name, None)
            if inspect.isclass(member) or inspect.isfunction(member):
                parts.append(f"{name}.{member_name}\n\n{inspect.getdoc(member) or ''}")
    return "\n\n".join(part for part in parts if part)


@torch.inference_mode()
def score(model: Model, tokens: Tensor, caches: Sequence[Cache], scored: int) -> tuple[float, list[Score]]:
    """Scores `caches` on the last `scored` positions of `tokens` int64 `[T]`.

    Returns the exact cache's perplexity and one score a cache, in order. Memory: the model, one layer's attention and
    the logits of `_HEAD_POSITIONS` positions, whatever the length.
    """
    head_size = model.head_size
    hidden = []
    for attention in (exact_attention, *(cache.attention for cache in caches)):
        with model.replaced(attention):
            hidden.append(model.hidden(tokens)[-scored:])
    # Position i predicts token i + 1; the last position predicts a token that is not there, so its KLD alone counts.
    targets = tokens[-scored + 1 :].to(hidden[0].device)
    kld: list[list[Tensor]] = [[] for _ in caches]
    same: list[list[Tensor]] = [[] for _ in caches]
    surprise: list[list[Tensor]] = [[] for _ in range(len(caches) + 1)]
    for first in range(0, scored, _HEAD_POSITIONS):
        part = slice(first, first + _HEAD_POSITIONS)
        target = targets[part]
        exact = model.log_probabilities(hidden[0][part])
        probability, best = exact.exp(), exact.argmax(-1)
        surprise[0].append(-exact[: len(target)].gather(1, target[:, None]))
        for index in range(len(caches)):
            ours = model.log_probabilities(hidden[index + 1][part])
            surprise[index + 1].append(-ours[: len(target)].gather(1, target[:, None]))
            same[index].append((ours.argmax(-1) == best).float())
            kld[index].append((ours.sub_(exact).neg_().mul_(probability)).sum(-1))
    perplexity = [torch.cat(parts).mean().exp().item() for parts in surprise]
    scores = []
    for index, cache in enumerate(caches):
        values = torch.cat(kld[index]).double()
        scores.append(
            Score(
                cache.name,
                cache.pair_bytes(head_size),
                values.mean().item(),
                values.std().item() / math.sqrt(len(values)),
                values.quantile(0.99).item(),
                torch.cat(same[index]).mean().item(),
                perplexity[index + 1],
                perplexity[index + 1] / perplexity[0] - 1,
            )
        )
    return perplexity[0], scores


def our_caches(
    model: Model, names: Sequence[str], text: str, max_positions: int, sink_tokens: int, recent_tokens: int
) -> list[Cache]:
    """Caches of our formats from names `FORMAT` or `FORMAT:KIND`; all are calibrated by one pass over `text`.

    Raises `FormatError` for an unknown format or kind.
    """
    wanted = []
    for name in names:
        format_name, _, kind = name.partition(":")
        fmt = formats.get_paged(format_name)
        kind = kind or calibrate.DEFAULT_KINDS[fmt.name]
        if kind not in (_UNCALIBRATED, *calibrate.KINDS):
            known = ", ".join((_UNCALIBRATED, *calibrate.KINDS))
            raise FormatError(f"transform {kind!r} in {name!r} is unknown: use one of {known}")
        wanted.append((fmt, kind))
    statistics = {}
    if any(kind != _UNCALIBRATED for _, kind in wanted):
        statistics = calibrate.measure(model, text, max_positions, recent_tokens=recent_tokens, sink_tokens=sink_tokens)
    caches = []
    for fmt, kind in wanted:
        calibrated: dict[int, LayerTransform] = {}
        if kind != _UNCALIBRATED:
            calibrated = {index: calibrate.transforms(layer, fmt, kind) for index, layer in statistics.items()}

        def layers(index: int, size: int, known: Any = calibrated, fmt: formats.Format = fmt) -> LayerTransform:
            return known[index] if known else default_transform(fmt, size)

        caches.append(coded_cache(f"{fmt.name}, {kind}", fmt, layers, sink_tokens, recent_tokens))
    return caches


def file_cache(path: str, sink_tokens: int, recent_tokens: int) -> Cache:
    """The cache that a calibration file serves. Raises `CalibrationError`."""
    loaded = calibration.load(path)
    fmt = formats.get_paged(loaded.format)
    name = f"{fmt.name}, {loaded.kind} ({Path(path).name})"
    return coded_cache(name, fmt, lambda index, _: loaded.layer(index), sink_tokens, recent_tokens)


def markdown(run: Run) -> str:
    """The table of one text at one length."""
    lines = [
        f"{run.text}: {run.tokens:,} tokens, the last {run.scored:,} scored; exact perplexity "
        f"{run.exact_perplexity:.2f} (text sha256 {run.text_sha256[:12]})",
        "",
        "| cache | bytes a pair | KLD, mean | KLD, p99 | same top-1 | perplexity |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {s.cache} | {s.pair_bytes:g} | {s.kld:.4f} ± {s.kld_error:.4f} | {s.kld_p99:.3f} | {s.top1:.1%} | "
        f"{s.perplexity_change:+.1%} |"
        for s in run.scores
    ]
    return "\n".join(lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="directory of a model that transformers loads")
    parser.add_argument(
        "--text", action="append", metavar="FILE", help="score this text; repeatable (default: Python's own docstrings)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=DEFAULT_TOKENS,
        help="lengths to run each text at (default: %(default)s)",
    )
    parser.add_argument(
        "--scored", type=int, default=DEFAULT_SCORED, help="last tokens to score, at most half (default: %(default)s)"
    )
    parser.add_argument(
        "--caches",
        nargs="+",
        default=DEFAULT_CACHES,
        metavar="FORMAT[:KIND]",
        help="our formats, with the transform hadamard, gain or dense (default: %(default)s)",
    )
    parser.add_argument("--calibration", metavar="FILE", help="also score the cache that this calibration file serves")
    parser.add_argument("--calibration-text", metavar="FILE", help="calibrate on this text, not the built-in one")
    parser.add_argument(
        "--max-positions",
        type=int,
        default=DEFAULT_MAX_POSITIONS,
        help="served length that calibration averages over (default: %(default)s)",
    )
    parser.add_argument("--sink-tokens", type=int, default=DEFAULT_SINK_TOKENS, help="(default: %(default)s)")
    parser.add_argument("--recent-tokens", type=int, default=DEFAULT_RECENT_TOKENS, help="(default: %(default)s)")
    parser.add_argument("--no-peers", action="store_true", help="leave out fp8, the seed's format and vLLM's presets")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns the exit status; a problem is one line on stderr and status 2."""
    try:
        runs, facts = _run(arguments)
    except (ModelError, CalibrationError, FormatError, OSError, UnicodeDecodeError, ValueError) as error:
        print(f"manthanquant quality: {error}", file=sys.stderr)
        return 2
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if arguments.json:
        report = {"facts": facts, "runs": [dataclasses.asdict(r) for r in runs]}
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _run(arguments: argparse.Namespace) -> tuple[list[Run], dict[str, Any]]:
    texts = {name: Path(name).read_text(encoding="utf-8") for name in arguments.text or ()}
    if not texts:
        texts = {f"docstrings of Python {platform.python_version()}": standard_library_text()}
    calibration_text = calibrate.built_in_text()
    if arguments.calibration_text:
        calibration_text = Path(arguments.calibration_text).read_text(encoding="utf-8")
    model = Model(arguments.model, arguments.device)
    model.check_head()
    samples = [_sample(model, name, text, length) for name, text in texts.items() for length in arguments.tokens]
    started = time.monotonic()
    tiers = (arguments.sink_tokens, arguments.recent_tokens)
    caches = our_caches(model, arguments.caches, calibration_text, arguments.max_positions, *tiers)
    calibrated = time.monotonic()
    if arguments.calibration:
        caches.append(file_cache(arguments.calibration, *tiers))
    if not arguments.no_peers:
        caches += [fp8_cache(), seed_cache(), *turboquant_caches(model.layers)]
    runs = []
    for name, text, tokens in samples:
        scored = min(arguments.scored, len(tokens) // 2)
        print(f"{name}: {len(tokens)} tokens, {len(caches)} caches ...", file=sys.stderr)
        perplexity, scores = score(model, tokens, caches, scored)
        digest = hashlib.sha256(text.encode()).hexdigest()
        runs.append(Run(name, digest, len(tokens), scored, perplexity, scores))
        print(markdown(runs[-1]), flush=True)
    facts = {
        "model": Path(arguments.model).name,
        "head size": model.head_size,
        "torch": torch.__version__,
        "calibration": f"{calibrated - started:.1f} s",
        "scoring": f"{time.monotonic() - calibrated:.0f} s",
        "peak memory": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB",
    }
    return runs, facts


def _sample(model: Model, name: str, text: str, length: int) -> tuple[str, str, Tensor]:
    tokens = model.tokens(text)
    if len(tokens) < length:
        raise ValueError(f"{name} has {len(tokens)} tokens, --tokens asks for {length}: give a longer text or less")
    if length < 2 * MIN_SCORED:
        raise ValueError(f"--tokens: {length} is too few, give {2 * MIN_SCORED} or more")
    return name, text, tokens[:length]
