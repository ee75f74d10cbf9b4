"""`csrc/layout.h` and the generated `codebook.h` say what `formats` and `codebook` say, bit by bit."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from manthanquant import formats
from manthanquant.codebook import INT8_LIMIT, codebook
from manthanquant.codebook_header import codebook_header

CSRC = Path(formats.__file__).parent / "csrc"

PROGRAM = r"""
#include <cstdio>
#include "codebook.h"
#include "layout.h"

template <class Side, class Place>
void print_side(int base, Place place) {
    for (int cls = 0; cls < Side::classes; ++cls)
        for (int token = 0; token < mq::kUnitTokens; ++token)
            for (int channel = 0; channel < Side::channels(cls); ++channel) {
                const mq::CodePlace code = place(token, channel, Side::registers(cls));
                for (int bit = 0; bit < Side::bits(cls); ++bit) {
                    const mq::BitPlace at =
                        mq::bit_place(Side::bits(cls), code.reg, Side::registers(cls), code.byte, bit);
                    const int offset = mq::word_offset(Side::first_word(cls) + at.word, Side::words, code.lane);
                    std::printf("%d %d\n", base + offset / 4, at.shift);
                }
            }
}

template <class Format, int kHeadSize>
void print_unit() {
    using Unit = mq::Unit<Format, kHeadSize>;
    std::printf("%d %d %d\n", Unit::bytes, Unit::value_offset, Unit::scale_offset);
    print_side<typename Unit::Key>(
        0, [](int token, int channel, int regs) { return mq::key_place(token, channel, regs); });
    print_side<typename Unit::Value>(
        Unit::value_offset / 4, [](int token, int channel, int) { return mq::value_place(token, channel); });
    for (int side = 0; side < 2; ++side)
        for (int token = 0; token < mq::kUnitTokens; ++token)
            std::printf("%d\n", Unit::scale_offset + mq::scale_place(side, token));
}

template <int kBits>
void print_codebook() {
    using Book = mq::Codebook<kBits>;
    for (float level : Book::levels) std::printf("%.9g\n", level);
    for (float boundary : Book::boundaries) std::printf("%.9g\n", boundary);
    std::printf("%.9g\n", Book::unit);
}

int main() {
BODY
}
"""


def expected_unit(fmt: formats.Format, head_size: int) -> list[str]:
    lines = [f"{fmt.unit_bytes(head_size)} {fmt.value_offset(head_size)} {fmt.scale_offset(head_size)}"]
    for side in formats.SIDES:
        table, first = formats.code_bits(fmt, side, head_size), 0
        for count in fmt.segments(side, head_size):
            lines += [f"{word} {shift}" for row in table for code in row[first : first + count] for word, shift in code]
            first += count
    for side in formats.SIDES:
        lines += [str(formats.scale_position(fmt, side, token, head_size)) for token in range(formats.UNIT_TOKENS)]
    return lines


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_headers_match_python(tmp_path: Path) -> None:
    body, expected = [], []
    for fmt in formats.PAGED_FORMATS.values():
        bits = ", ".join(str(b) for b in (*(*fmt.key_bits, 0)[:2], *(*fmt.value_bits, 0)[:2]))
        for head_size in formats.SUPPORTED_HEAD_SIZES:
            body.append(f"    print_unit<mq::Format<{bits}>, {head_size}>();")
            expected += expected_unit(fmt, head_size)
    integers = len(expected)
    numbers: list[float] = []
    for width in INT8_LIMIT:
        body.append(f"    print_codebook<{width}>();")
        book = codebook(width)
        numbers += [*book.int8_levels, *book.boundaries, book.unit]
    (tmp_path / "codebook.h").write_text(codebook_header())
    (tmp_path / "main.cpp").write_text(PROGRAM.replace("BODY", "\n".join(body)))
    subprocess.run(
        ["g++", "-std=c++17", "-Wall", "-Werror", f"-I{CSRC}", f"-I{tmp_path}", "main.cpp", "-o", "main"],
        cwd=tmp_path,
        check=True,
    )
    printed = subprocess.run([tmp_path / "main"], check=True, capture_output=True, text=True).stdout.splitlines()
    assert printed[:integers] == expected
    assert [float(line) for line in printed[integers:]] == pytest.approx(numbers, rel=1e-7)
