"""The codebooks as a C++ header, so that C++ and CUDA use the levels of `codebook` and define none themselves.

A build writes `codebook_header()` to `codebook.h` in a directory on its include path.
"""

from __future__ import annotations

from collections.abc import Iterable

from manthanquant.codebook import INT8_LIMIT, codebook, lloyd_max, midpoints
from manthanquant.formats import SEED3

_BOOK = """
template <>
struct Codebook<{bits}> {{
    static constexpr int count = {count};
    static constexpr float levels[count] = {{{levels}}};  // ascending, in units of 1 / unit
    static constexpr float boundaries[count - 1] = {{{boundaries}}};  // at unit variance
    static constexpr float unit = {unit};
}};
"""


def _floats(values: Iterable[float]) -> str:
    """C++ float literals that round to the nearest fp32, as `torch.tensor` does."""
    return ", ".join(f"{value!r}f" for value in values)


def codebook_header() -> str:
    """The text of `codebook.h`: `mq::Codebook<bits>` for each code width."""
    books = "".join(
        _BOOK.format(
            bits=bits,
            count=2**bits,
            levels=_floats(codebook(bits).int8_levels),
            boundaries=_floats(codebook(bits).boundaries),
            unit=_floats([codebook(bits).unit]),
        )
        for bits in INT8_LIMIT
    )
    return f"""// Generated from manthanquant/codebook.py; a code's value at unit variance is levels[code] / unit.
#pragma once

namespace mq {{

template <int kBits>
struct Codebook;
{books}
}}  // namespace mq
"""


def seed_codebook_header() -> str:
    """The text of `seed_codebook.h`: the exact Lloyd-Max levels that the seed format uses, at unit variance."""
    levels = lloyd_max(SEED3.bits)
    return f"""// Generated from manthanquant/codebook.py.
#pragma once

namespace mq {{

struct SeedCodebook {{
    float levels[{len(levels)}] = {{{_floats(levels)}}};  // ascending
    float boundaries[{len(levels) - 1}] = {{{_floats(midpoints(levels))}}};
}};

}}  // namespace mq
"""
