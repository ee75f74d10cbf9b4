"""`manthanquant formats`: the formats as a table."""

from __future__ import annotations

import argparse
import sys

from manthanquant import formats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head-size", type=int, default=128, help="channels of a head (default 128)")


def rows(head_size: int) -> list[tuple[str, str, str, str, str]]:
    """Name and aliases, bytes of a K+V pair, bits an element, ratio to bf16, summary."""
    table = []
    ours: list[formats.Format | formats.SeedFormat] = [*formats.PAGED_FORMATS.values(), formats.SEED3]
    for fmt in ours:
        aliases = [alias for alias, name in formats.ALIASES.items() if name == fmt.name]
        label = ", ".join([fmt.name, *aliases])
        size = fmt.token_bytes(head_size)
        bits, ratio = f"{fmt.bits_per_element(head_size):.2f}", f"{fmt.ratio(head_size):.2f}x"
        table.append((label, str(size), bits, ratio, fmt.summary))
    for name, element in formats.ENGINE_FORMATS.items():
        size = 2 * head_size * element
        table.append((name, str(size), f"{8 * element:.2f}", f"{2 / element:.2f}x", "the engine's own"))
    return table


def run(args: argparse.Namespace) -> int:
    try:
        formats.check_head_size(args.head_size)
    except formats.FormatError as error:
        print(f"manthanquant formats: {error}", file=sys.stderr)
        return 2
    print(f"head size {args.head_size}; bytes of one token's K+V pair of one KV head; default {formats.DEFAULT_FORMAT}")
    print(f"{'format':<12}{'bytes':>7}{'bits':>7}{'ratio':>8}  what")
    for label, size, bits, ratio, summary in rows(args.head_size):
        print(f"{label:<12}{size:>7}{bits:>7}{ratio:>8}  {summary}")
    return 0
