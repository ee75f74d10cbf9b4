"""Kubernetes quantities of bytes. (The client library's own parser would pull the whole client into pure modules.)"""

from __future__ import annotations

_BINARY = {f"{s}i": 1024 ** (i + 1) for i, s in enumerate("KMGTPE")}
_SUFFIXES = {"": 1, "m": 1e-3, **{s: 1000 ** (i + 1) for i, s in enumerate("kMGTPE")}, **_BINARY}


def bytes_of(quantity: str) -> int:
    """A Kubernetes quantity in bytes: 1.5Gi -> 1610612736."""
    number = quantity.rstrip("mkKMGTPEi")
    return int(float(number) * _SUFFIXES[quantity[len(number) :]])


def quantity_of(count: int) -> str:
    """Bytes as a Kubernetes quantity with the largest suffix that divides them: 1610612736 -> 1536Mi."""
    for suffix in ("Gi", "Mi", "Ki"):
        if count and count % _BINARY[suffix] == 0:
            return f"{count // _BINARY[suffix]}{suffix}"
    return str(count)
