import pytest

from manthanquant import formats
from manthanquant.formats import PAGED_FORMATS, SIDES, SUPPORTED_HEAD_SIZES, UNIT_TOKENS

EVERY = [(fmt, size) for fmt in PAGED_FORMATS.values() for size in SUPPORTED_HEAD_SIZES]


@pytest.mark.parametrize(
    ("name", "head_size", "pair_bytes", "ratio"),
    [
        ("k3v3", 128, 100, 5.12),
        ("k42v3", 128, 100, 5.12),
        ("k42v42", 128, 100, 5.12),
        ("k4v4", 128, 132, 3.88),
        ("mq3", 64, 52, 4.92),
        ("mq3", 256, 196, 5.22),
        ("seed3", 128, 104, 4.92),
        ("seed3", 256, 200, 5.12),
    ],
)
def test_bytes_of_a_token(name, head_size, pair_bytes, ratio):
    fmt = formats.get(name)
    assert fmt.token_bytes(head_size) == pair_bytes
    assert fmt.ratio(head_size) == pytest.approx(ratio, abs=0.005)


@pytest.mark.parametrize(("fmt", "head_size"), EVERY, ids=lambda x: getattr(x, "name", x))
def test_every_bit_has_a_place_of_its_own(fmt, head_size):
    taken = set()
    for side in SIDES:
        table = formats.code_bits(fmt, side, head_size)
        assert len(table) == UNIT_TOKENS and {len(row) for row in table} == {head_size}
        widths = [b for b, n in zip(fmt.bits(side), fmt.segments(side, head_size)) for _ in range(n)]
        for row in table:
            for width, places in zip(widths, row):
                assert len(places) == width
                for word, shift in places:
                    assert 0 <= shift < 32 and 4 * word < fmt.scale_offset(head_size)
                    taken.add((word, shift))
    codes = sum(b * n for s in SIDES for b, n in zip(fmt.bits(s), fmt.segments(s, head_size)))
    assert len(taken) == codes * UNIT_TOKENS
    scales = {formats.scale_position(fmt, s, t, head_size) for s in SIDES for t in range(UNIT_TOKENS)}
    assert scales == set(range(fmt.scale_offset(head_size), fmt.unit_bytes(head_size), 2))


def test_keys_are_the_a_operand_of_m16n8k32():
    """Two places worked out by hand from the instruction's fragment tables, D = 128, 3 bits."""
    table = formats.code_bits(formats.K3V3, "key", 128)
    # token 0, channel 0: lane 0, register 0, byte 0: word 0 of the lane, bits 0 to 2
    assert table[0][0] == ((0, 0), (0, 1), (0, 2))
    # token 9 = 1 + 8, channel 39 = 32 + 4 + 3: lane 5, the second token's words 3 to 5, register 2, byte 3: word 4,
    # low half, nibble 3; word 4 is in the pair behind the groups of four: (512 + 5 * 8) / 4
    assert table[9][39] == ((138, 12), (138, 13), (138, 14))


def test_two_classes_split_at_a_multiple_of_sixteen():
    assert formats.K42V3.segments("key", 128) == (64, 64)
    assert formats.K42V3.segments("key", 80) == (48, 32)
    assert formats.K42V3.segments("value", 80) == (80,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: formats.get("q8"), "format 'q8' is unknown: use one of mq3"),
        (lambda: formats.get_paged("seed3"), "has no page"),
        (lambda: formats.K3V3.segments("key", 72), "head size 72 is not supported"),
        (lambda: formats.K3V3.page_bytes(128, 8, 24), "page size 24 is not a positive multiple of 16"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(call, message):
    with pytest.raises(formats.FormatError, match=message):
        call()
