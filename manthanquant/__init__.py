"""manthanquant: LLM serving on a KV cache that is really 3-bit.

`encode` and `decode` code plain vectors; `formats` describes the formats. PyTorch is imported only when they are used,
so that the operator, which has none, can import this package.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["Encoded", "decode", "encode", "formats"]


def __getattr__(name: str) -> Any:
    if name == "formats":
        return importlib.import_module("manthanquant.formats")
    if name in ("Encoded", "decode", "encode"):
        return getattr(importlib.import_module("manthanquant.vectors"), name)
    raise AttributeError(f"module 'manthanquant' has no attribute {name!r}")
