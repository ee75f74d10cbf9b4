"""The kernels there are: which extension serves a format and head size on an architecture."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from manthanquant.codebook_header import codebook_header
from manthanquant.formats import Format, check_head_size
from manthanquant.jit.spec import Extension

CSRC = Path(__file__).parent.parent / "csrc"


@cache
def cpu_extension(fmt: Format, head_size: int) -> Extension:
    """The CPU attention and store, specialised for one format and head size. Raises `FormatError` for the latter."""
    check_head_size(head_size)
    name = f"manthanquant_cpu_{fmt.name}_d{head_size}"
    return Extension(
        name,
        sources=(CSRC / "cpu_bindings.cpp", CSRC / "cpu_attention.cpp", CSRC / "cpu_store.cpp"),
        headers=(CSRC / "layout.h", *sorted(CSRC.glob("cpu_*.h"))),
        generated=(("codebook.h", codebook_header()),),
        flags=(f"-DMQ_MODULE={name}", f"-DMQ_FORMAT={fmt.name.upper()}", f"-DMQ_HEAD_SIZE={head_size}"),
    )
