import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manthanquant.formats import PAGED_FORMATS, SIDES, SUPPORTED_HEAD_SIZES, UNIT_TOKENS
from manthanquant.packing import pack_bitstream, pack_units, pages_as_units, unpack_bitstream, unpack_units

EVERY = [(fmt, size) for fmt in PAGED_FORMATS.values() for size in SUPPORTED_HEAD_SIZES]


def random_codes(fmt, side, head_size, *batch):
    parts = [
        torch.randint(0, 2**bits, (*batch, UNIT_TOKENS, n), dtype=torch.uint8)
        for bits, n in zip(fmt.bits(side), fmt.segments(side, head_size))
    ]
    return torch.cat(parts, -1)


@pytest.mark.parametrize(("fmt", "head_size"), EVERY, ids=lambda x: getattr(x, "name", x))
def test_units_round_trip(fmt, head_size):
    codes = {side: random_codes(fmt, side, head_size, 3, 2) for side in SIDES}
    scales = {side: torch.randint(0, 256, (3, 2, UNIT_TOKENS, 2), dtype=torch.uint8) for side in SIDES}
    data = pack_units(codes, scales, fmt)
    assert data.shape == (3, 2, fmt.unit_bytes(head_size))
    for side in SIDES:
        got_codes, got_scales = unpack_units(data, fmt, side, head_size)
        assert torch.equal(got_codes, codes[side]) and torch.equal(got_scales, scales[side])


@pytest.mark.parametrize("fmt", PAGED_FORMATS.values(), ids=lambda f: f.name)
def test_every_code_at_every_position(fmt):
    """Each position in turn takes each code while all others are zero: no bit leaks into a neighbour."""
    head_size = 64
    for side in SIDES:
        for channel in range(head_size):
            width = fmt.bits(side)[0 if channel < fmt.segments(side, head_size)[0] else 1]
            count = UNIT_TOKENS * 2**width
            codes = {s: torch.zeros(count, UNIT_TOKENS, head_size, dtype=torch.uint8) for s in SIDES}
            token, code = torch.arange(count) // 2**width, torch.arange(count) % 2**width
            codes[side][torch.arange(count), token, channel] = code.to(torch.uint8)
            scales = {s: torch.zeros(count, UNIT_TOKENS, 2, dtype=torch.uint8) for s in SIDES}
            data = pack_units(codes, scales, fmt)
            for s in SIDES:
                assert torch.equal(unpack_units(data, fmt, s, head_size)[0], codes[s])


@settings(max_examples=50, deadline=None)
@given(count=st.integers(0, 5), size=st.integers(1, 140), bits=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_bitstream_round_trip(count, size, bits, seed):
    codes = torch.randint(0, 2**bits, (count, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    data = pack_bitstream(codes, bits)
    assert data.shape == (count, -(-size * bits // 32) * 4)
    assert torch.equal(unpack_bitstream(data, bits, size), codes)


def test_a_code_that_straddles_words_is_split():
    """Coordinate 10 of a 3-bit stream has bits 30 to 32: two in the first word, one in the second."""
    codes = torch.zeros(1, 128, dtype=torch.uint8)
    codes[0, 10] = 7
    words = pack_bitstream(codes, 3).view(torch.int32)[0]
    assert words[0] == -(1 << 30) and words[1] == 1 and not words[2:].any()


def test_a_cache_that_is_no_run_of_units_is_refused():
    fmt = PAGED_FORMATS["k3v3"]
    good = torch.zeros(2, 3, 32, 52, dtype=torch.uint8)
    assert pages_as_units(good, fmt, 64).shape == (2, 3, 2, 832)
    for bad in (good.transpose(1, 2), good[..., :51], torch.zeros(2, 3, 24, 52, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="no run of k3v3 units"):
            pages_as_units(bad, fmt, 64)
