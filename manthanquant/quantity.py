"""Sizes in bytes as people write them: 512Mi, 1.5GiB, 24G."""

from __future__ import annotations

import re

_UNITS = {"": 1} | {
    prefix + binary: (1024 if binary else 1000) ** (power + 1)
    for power, prefix in enumerate("KMGTP")
    for binary in ("", "i")
}


def parse_bytes(text: str) -> int:
    """Bytes of `text`. Raises `ValueError` naming it."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]i?)?B?\s*", text, re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r} is no size: write bytes, or a number with Ki, Mi, Gi, K, M or G")
    unit = (match[2] or "").upper().replace("I", "i")
    return int(float(match[1]) * _UNITS[unit])


def show_bytes(count: int) -> str:
    """`count` with the largest binary unit that leaves at least 1."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
