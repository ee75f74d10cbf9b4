"""The kernels there are: which extension serves a format, head size and dtype on an architecture."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from manthanquant.codebook_header import codebook_header, seed_codebook_header
from manthanquant.formats import Format, check_head_size
from manthanquant.jit.spec import Extension

CSRC = Path(__file__).parent.parent / "csrc"
_CUDA_TYPES = {"bfloat16": "__nv_bfloat16", "float16": "__half"}
DTYPES = tuple(_CUDA_TYPES)
DECODE_ROWS = (4, 8, 16)  # (query token, head) rows of a KV head that a decode kernel works on at a time


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


@cache
def store_extension(fmt: Format, head_size: int, dtype: str, *, wgmma: bool | None = None) -> Extension:
    """The CUDA store, for one format, head size and dtype of keys and values (`bfloat16` or `float16`).

    `wgmma` False forces the path for GPUs without that instruction; None lets the architecture choose.
    """
    check_head_size(head_size)
    path = "" if wgmma is None else f"_wgmma{wgmma:d}"
    return _cuda_extension(
        f"manthanquant_store_{fmt.name}_d{head_size}_{dtype}{path}",
        "store",
        f"-DMQ_FORMAT={fmt.name.upper()}",
        f"-DMQ_HEAD_SIZE={head_size}",
        f"-DMQ_STORE_ELEMENT={_CUDA_TYPES[dtype]}",
        *(() if wgmma is None else (f"-DMQ_WGMMA={wgmma:d}",)),
    )


@cache
def decode_extension(
    fmt: Format, head_size: int, rows: int, *, exact: bool, bulk_copy: bool | None = None
) -> Extension:
    """Decode attention, for one format, head size and rows at a time (`DECODE_ROWS`), with or without the exact tier.

    `bulk_copy` False forces the path for GPUs without bulk copies; None lets the architecture choose.
    """
    check_head_size(head_size)
    tier, path = "exact" if exact else "coded", "" if bulk_copy is None else f"_bulk{bulk_copy:d}"
    return _cuda_extension(
        f"manthanquant_decode_{fmt.name}_d{head_size}_r{rows}_{tier}{path}",
        "decode",
        f"-DMQ_FORMAT={fmt.name.upper()}",
        f"-DMQ_HEAD_SIZE={head_size}",
        f"-DMQ_ROWS={rows}",
        f"-DMQ_EXACT={exact:d}",
        *(() if bulk_copy is None else (f"-DMQ_BULK_COPY={bulk_copy:d}",)),
    )


@cache
def prefix_extension(fmt: Format, head_size: int, dtype: str, *, wgmma: bool | None = None) -> Extension:
    """What prefill needs of the cache, for one format, head size and dtype of what is read back (as for the store).

    `wgmma` False forces the path for GPUs without that instruction; None lets the architecture choose.
    """
    check_head_size(head_size)
    path = "" if wgmma is None else f"_wgmma{wgmma:d}"
    return _cuda_extension(
        f"manthanquant_prefix_{fmt.name}_d{head_size}_{dtype}{path}",
        "prefix",
        f"-DMQ_FORMAT={fmt.name.upper()}",
        f"-DMQ_HEAD_SIZE={head_size}",
        f"-DMQ_PREFIX_ELEMENT={_CUDA_TYPES[dtype]}",
        *(() if wgmma is None else (f"-DMQ_WGMMA={wgmma:d}",)),
    )


@cache
def vectors_extension() -> Extension:
    """The CUDA encode and decode of plain vectors: every dtype and size in one module."""
    return _cuda_extension("manthanquant_vectors", "vectors")


def cuda_extensions(fmt: Format, head_size: int, dtype: str) -> tuple[Extension, ...]:
    """Every CUDA kernel that a model of this head size and dtype uses."""
    decode = [decode_extension(fmt, head_size, rows, exact=exact) for rows in DECODE_ROWS for exact in (True, False)]
    return (store_extension(fmt, head_size, dtype), prefix_extension(fmt, head_size, dtype), *decode)


def _cuda_extension(name: str, stem: str, *flags: str) -> Extension:
    """`stem.cu` with its binding `stem_bindings.cpp`; all headers of `stem` and the shared ones go into the key."""
    names = ("layout.h", "bindings.h", "ptx.cuh", "wgmma.cuh", "rotation.cuh", "decode_codes.cuh")
    shared = tuple(CSRC / name for name in names)
    return Extension(
        name,
        sources=(CSRC / f"{stem}.cu", CSRC / f"{stem}_bindings.cpp"),
        headers=tuple(dict.fromkeys((*shared, *sorted(CSRC.glob(f"{stem}*.h")), *sorted(CSRC.glob(f"{stem}*.cuh"))))),
        generated=(("codebook.h", codebook_header()), ("seed_codebook.h", seed_codebook_header())),
        flags=(f"-DMQ_MODULE={name}", *flags),
    )
