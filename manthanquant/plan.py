"""`manthanquant plan MODEL`: what a model's cache costs, from its config.json alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from manthanquant import capacity, contract, formats, settings
from manthanquant.quantity import parse_bytes, show_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model's directory or its config.json")
    parser.add_argument("--memory", default="1Gi", help="bytes of cache, such as 512Mi or 24Gi (default 1Gi)")
    requests = contract.CPU_MAX_REQUESTS
    parser.add_argument(
        "--max-num-seqs",
        type=int,
        default=requests,
        help=f"requests that run at once (default {requests}, as on a CPU)",
    )
    settings.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    try:
        wanted = settings.from_args(args)
        memory = parse_bytes(args.memory)
        path = Path(args.model)
        shape = capacity.model_shape(capacity.read_config(path.parent if path.name == "config.json" else path))
        lines = table(shape, wanted, memory, args.max_num_seqs)
    except (settings.SettingsError, capacity.UnsupportedModel, formats.FormatError, ValueError) as error:
        print(f"manthanquant plan: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


def table(shape: capacity.ModelShape, wanted: settings.Settings, memory: int, max_requests: int) -> list[str]:
    """The answer as lines of text."""
    report = capacity.estimate(shape, wanted, memory, max_requests)
    windows = sorted({layer.window for layer in shape.layers if layer.window})
    sliding = sum(layer.kind == "sliding" for layer in shape.layers)
    heads = sorted({(layer.kv_heads, layer.head_size) for layer in shape.layers})
    engine = report.bytes_per_token_uncompressed or 0
    return [
        f"model            {shape.model_type}: {len(shape.layers)} layers with a cache"
        + (f", {sliding} of them see the newest {', '.join(map(str, windows))} tokens only" if sliding else ""),
        f"heads            {', '.join(f'{count} KV heads of {size}' for count, size in heads)}",
        f"format           {report.format}, mode {report.mode}: {report.bits_per_element} bits an element",
        f"bytes per token  {report.bytes_per_token:,} ({report.compression_ratio}x less than {engine:,})",
        f"tokens that fit  {report.capacity_tokens:,} in {show_bytes(memory)} of pages; "
        f"{memory // engine:,} in the engine's own format",
        f"exact tier       {show_bytes(report.hot_pool_bytes or 0)} beside the pages, for {max_requests} requests",
    ]
