"""Lloyd-Max codebooks for N(0, 1), and the 8-bit levels that the kernels multiply with.

`lloyd_max` computes the optimum (Lloyd 1982, Max 1960) from the normal density; nothing here is pasted. The kernels
feed levels to int8 matrix instructions, so each codebook is also rounded to integers, or to half-integers at 4 bits
(where a byte-permute table holds `level + 63.5`), at the unit that costs the least error. Those rounded levels are the
format: encode, decode and every kernel use them, and `distortion` states what they cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

INT8_LIMIT = {2: 127.0, 3: 127.0, 4: 63.5}
HALF_INTEGER_BITS = 4
_TOLERANCE = 1e-12
_MAX_SWEEPS = 20_000


def _density(x: float) -> float:
    return 0.0 if math.isinf(x) else math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _cumulative(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def midpoints(levels: Sequence[float]) -> tuple[float, ...]:
    """The decision boundaries of ascending `levels`: nearest level wins, a tie goes to the lower one."""
    return tuple((a + b) / 2 for a, b in pairwise(levels))


def gaussian_mse(levels: Sequence[float]) -> float:
    """Mean squared error of rounding N(0, 1) to the nearest of ascending `levels`."""
    edges = (-math.inf, *midpoints(levels), math.inf)
    error = 1.0
    for level, low, high in zip(levels, edges, edges[1:]):
        mass, moment = _cumulative(high) - _cumulative(low), _density(low) - _density(high)
        error += level * level * mass - 2 * level * moment
    return error


@cache
def lloyd_max(bits: int) -> tuple[float, ...]:
    """The 2^bits levels of least mean squared error for N(0, 1), ascending and symmetric.

    Lloyd's iteration on the positive half: each level moves to the centroid of its cell, each boundary to the
    midpoint of its neighbours.
    """
    count = 2 ** (bits - 1)
    levels = [(i + 0.5) * 4 / (2 * count) for i in range(count)]
    for _ in range(_MAX_SWEEPS):
        edges = (0.0, *midpoints(levels), math.inf)
        moved = [
            (_density(low) - _density(high)) / (_cumulative(high) - _cumulative(low)) for low, high in pairwise(edges)
        ]
        step = max(abs(a - b) for a, b in zip(moved, levels))
        levels = moved
        if step < _TOLERANCE:
            break
    else:
        raise ArithmeticError(f"Lloyd-Max for {bits} bits did not settle in {_MAX_SWEEPS} sweeps")
    return (*(-x for x in reversed(levels)), *levels)


@dataclass(frozen=True)
class Codebook:
    """The levels of one code width as the kernels hold them.

    A code's value at unit variance is `int8_levels[code] / unit`; codes index ascending levels. At 4 bits the stored
    nibble is sign-magnitude instead (see `packing`), a relabelling that changes no value.
    """

    bits: int
    int8_levels: tuple[float, ...]  # integers, or half-integers at 4 bits
    unit: float
    distortion: float  # mean squared error on N(0, 1)

    @property
    def levels(self) -> tuple[float, ...]:
        return tuple(level / self.unit for level in self.int8_levels)

    @property
    def boundaries(self) -> tuple[float, ...]:
        return midpoints(self.levels)


@cache
def codebook(bits: int) -> Codebook:
    """The 8-bit codebook for `bits` in 2, 3, 4: `lloyd_max` rounded at the unit of least distortion."""
    if bits not in INT8_LIMIT:
        raise ValueError(f"code width {bits} is not supported: use one of {tuple(INT8_LIMIT)}")
    exact = lloyd_max(bits)[2 ** (bits - 1) :]
    limit, shift = INT8_LIMIT[bits], 0.5 if bits == HALF_INTEGER_BITS else 0.0
    best: Codebook | None = None
    for step in range(400):
        scale = limit / exact[-1] * (1 - step / 1000)
        rounded = [round(x * scale - shift) + shift for x in exact]
        if rounded[-1] > limit or len(set(rounded)) < len(rounded):
            continue
        levels = (*(-x for x in reversed(rounded)), *rounded)
        # The best unit for given integers is the least-squares fit of the exact levels.
        unit = sum(x * x for x in rounded) / sum(x * y for x, y in zip(rounded, exact))
        error = gaussian_mse([x / unit for x in levels])
        if best is None or error < best.distortion - 1e-9:
            best = Codebook(bits, levels, unit, error)
    assert best is not None
    return best
