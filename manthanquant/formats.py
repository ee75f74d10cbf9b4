"""The KV-cache formats and the layout of a page: every byte and bit of it, defined here and nowhere else.

Standard library only. The PyTorch reference (`packing`), the CPU extension and the CUDA kernels all read and write
these bytes; `csrc/layout.h` states the same layout for the compiler, and a test compares the two bit by bit.

A page is `[KV head][unit]`; a unit holds 16 tokens of one KV head: key codes, then value codes, then scales. Codes lie
in the order in which `mma.sync.m16n8k32` wants its A operand, so a decode kernel reads them with one conflict-free
shared-memory load a lane and no shuffles:

* A warp's 32 lanes are numbered `lane = 4 g + c` (g = 0..7, c = 0..3). A register holds four 8-bit elements, b = 0..3.
* Keys are the A operand of Q K^T (rows are tokens, columns are channels). For token `g + 8 half`, register `2 j + h`
  of the token holds channel `32 j + 16 h + 4 c + b`.
* Values are the A operand of P V (rows are channels, columns are tokens). Register `2 m + h` holds channel
  `16 m + 8 h + g`; its byte b is token `2 c + (0, 8, 1, 9)[b]`.

Registers are packed into 32-bit words, class by class (`_Class`); a lane's words are stored in groups of four (one
16-byte load), then two, then one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

UNIT_TOKENS = 16
LANES = 32
SUPPORTED_HEAD_SIZES = (64, 80, 96, 128, 256)
SCALE_BYTES = 2  # a side and token: one fp16, or two e4m4 of one byte each
E4M4_EXPONENT_BIAS = 6  # an e4m4 byte, shifted left by 6 into an fp16 pattern, is the scale divided by 2^6

Side = Literal["key", "value"]
SIDES: tuple[Side, Side] = ("key", "value")
VALUE_BYTE_TOKENS = (0, 8, 1, 9)


class FormatError(ValueError):
    """A format, head size or page size that does not exist; the text names the value and what is supported."""


@dataclass(frozen=True)
class Format:
    """A paged format: the bits of each class of channels, most important class first, for keys and for values.

    A side with one class has one fp16 scale a token; with two classes it has one e4m4 scale a class.
    """

    name: str
    key_bits: tuple[int, ...]
    value_bits: tuple[int, ...]
    summary: str

    def bits(self, side: Side) -> tuple[int, ...]:
        return self.key_bits if side == "key" else self.value_bits

    def segments(self, side: Side, head_size: int) -> tuple[int, ...]:
        """Channels of each class, in order. Two classes split the head at a multiple of 16 (half, rounded up)."""
        check_head_size(head_size)
        if len(self.bits(side)) == 1:
            return (head_size,)
        first = -(-head_size // 32) * 16
        return (first, head_size - first)

    def words(self, side: Side, head_size: int) -> int:
        """32-bit words a lane owns in a unit, on one side."""
        return sum(_class_words(bits, n // 8) for bits, n in zip(self.bits(side), self.segments(side, head_size)))

    def scale_offset(self, head_size: int) -> int:
        """Byte offset of the scales in a unit; the key codes are at 0."""
        return sum(self.words(side, head_size) for side in SIDES) * LANES * 4

    def value_offset(self, head_size: int) -> int:
        """Byte offset of the value codes in a unit."""
        return self.words("key", head_size) * LANES * 4

    def unit_bytes(self, head_size: int) -> int:
        return self.scale_offset(head_size) + UNIT_TOKENS * 2 * SCALE_BYTES

    def token_bytes(self, head_size: int) -> int:
        """Bytes of one token's K+V pair of one KV head."""
        return self.unit_bytes(head_size) // UNIT_TOKENS

    def page_bytes(self, head_size: int, kv_heads: int, page_tokens: int) -> int:
        check_page_tokens(page_tokens)
        return self.token_bytes(head_size) * kv_heads * page_tokens

    def ratio(self, head_size: int, element_bytes: int = 2) -> float:
        """How many times the tokens of an uncompressed cache fit in the same bytes."""
        return 2 * head_size * element_bytes / self.token_bytes(head_size)

    def bits_per_element(self, head_size: int) -> float:
        return self.token_bytes(head_size) * 8 / (2 * head_size)


@dataclass(frozen=True)
class SeedFormat:
    """The seed system's vector layout: an fp32 radius, then 3-bit codes as one little-endian bit stream.

    No rotation; code i occupies bits 3 i to 3 i + 2 of the stream, so codes straddle 32-bit words. It has no page: it
    serves `encode`, `decode` and the shadow mode.
    """

    name: str = "seed3"
    bits: int = 3
    radius_bytes: int = 4
    summary: str = "the seed's own: 3 bits, no rotation, fp32 radius; vectors only, no pages"

    def code_bytes(self, head_size: int) -> int:
        return -(-head_size * self.bits // 32) * 4

    def vector_bytes(self, head_size: int) -> int:
        return self.radius_bytes + self.code_bytes(head_size)

    def token_bytes(self, head_size: int) -> int:
        return 2 * self.vector_bytes(head_size)

    def ratio(self, head_size: int, element_bytes: int = 2) -> float:
        return head_size * element_bytes / self.vector_bytes(head_size)

    def bits_per_element(self, head_size: int) -> float:
        return self.vector_bytes(head_size) * 8 / head_size


K3V3 = Format("k3v3", (3,), (3,), "3 bits all over, one fp16 scale a side")
K42V3 = Format("k42v3", (4, 2), (3,), "keys 4 bits for the important half and 2 for the rest; values 3 bits")
K42V42 = Format("k42v42", (4, 2), (4, 2), "keys and values 4 bits for the important half and 2 for the rest")
K4V4 = Format("k4v4", (4,), (4,), "4 bits all over, one fp16 scale a side")
SEED3 = SeedFormat()

PAGED_FORMATS: dict[str, Format] = {f.name: f for f in (K3V3, K42V3, K42V42, K4V4)}
ALIASES = {"mq3": "k42v3", "mq4": "k4v4"}
ENGINE_FORMATS = {"bf16": 2, "fp8": 1}  # the engine's own caches, served without us; bytes an element
DEFAULT_FORMAT = "mq3"
FORMAT_NAMES = (*ALIASES, *PAGED_FORMATS, SEED3.name, *ENGINE_FORMATS)


# How far a kernel may lie from the PyTorch reference. Both work in fp32 but sum in another order, so a value next to a
# decision boundary may take the neighbouring code, and the scale follows. A kernel's attention rounds queries and
# weights to 15 bits or more, once each: on random vectors, typically 1e-4 of an output vector's norm.
KERNEL_CODE_MISMATCHES = 1e-3  # share of codes, each off by one step
KERNEL_ATTENTION_ERROR = 1e-3  # relative L2 error of any output vector


def get(name: str) -> Format | SeedFormat:
    """The format called `name`, aliases included. Raises `FormatError` for an unknown or engine-native name."""
    name = ALIASES.get(name, name)
    if name == SEED3.name:
        return SEED3
    if name not in PAGED_FORMATS:
        raise FormatError(f"format {name!r} is unknown: use one of {', '.join((*ALIASES, *PAGED_FORMATS, SEED3.name))}")
    return PAGED_FORMATS[name]


def get_paged(name: str) -> Format:
    """As `get`, but only formats that have a page."""
    found = get(name)
    if not isinstance(found, Format):
        raise FormatError(f"format {name!r} has no page and cannot hold a cache: use one of {', '.join(PAGED_FORMATS)}")
    return found


def check_head_size(head_size: int) -> None:
    if head_size not in SUPPORTED_HEAD_SIZES:
        raise FormatError(f"head size {head_size} is not supported: use one of {SUPPORTED_HEAD_SIZES}")


def check_page_tokens(page_tokens: int) -> None:
    if page_tokens < UNIT_TOKENS or page_tokens % UNIT_TOKENS:
        raise FormatError(f"page size {page_tokens} is not a positive multiple of {UNIT_TOKENS} tokens")


# -- where each code lies ------------------------------------------------------------------------------------------


def _class_words(bits: int, registers: int) -> int:
    """Words that `registers` registers of one class take. 3 bits: 8 registers in 3 words, a rest as nibbles."""
    if bits == 3:
        return registers // 8 * 3 + -(-(registers % 8) // 2)
    return -(-registers * bits // 8)


def _register_bits(bits: int, register: int, registers: int) -> list[tuple[int, int]]:
    """(word, shift) of each code bit of byte 0 of a register, least significant bit first; byte b adds 4 b.

    4 bits: two registers a word, low half and high half. 2 bits: four registers a word, bits 0-1 of the nibbles of
    the low and the high half, then bits 2-3. 3 bits: in a block of 8 registers, 0 to 5 are the low three bits of the
    nibbles of words 0, 0, 1, 1, 2, 2 (low half, high half), and bit k of registers 6 and 7 is bit 3 of the nibbles of
    word k; registers past the last whole block lie as 4-bit ones do.
    """
    if bits == 2:
        word, part = divmod(register, 4)
        return [(word, 16 * (part % 2) + 2 * (part // 2) + k) for k in range(2)]
    block, part = divmod(register, 8)
    if bits == 3 and block < registers // 8:
        if part < 6:
            return [(3 * block + part // 2, 16 * (part % 2) + k) for k in range(3)]
        return [(3 * block + k, 16 * (part - 6) + 3) for k in range(3)]
    first = registers // 8 * 3 if bits == 3 else 0
    rest = register - (registers // 8 * 8 if bits == 3 else 0)
    return [(first + rest // 2, 16 * (rest % 2) + k) for k in range(bits)]


def _word_offset(word: int, words: int, lane: int) -> int:
    """Byte offset, within a side, of a lane's word: whole groups of four, then a pair, then a single word."""
    quads = words // 4 * 4
    if word < quads:
        return (word // 4) * 512 + lane * 16 + (word % 4) * 4
    if words % 4 >= 2 and word < quads + 2:
        return quads * 128 + lane * 8 + (word - quads) * 4
    return (words - 1) * 128 + lane * 4


@cache
def code_bits(fmt: Format, side: Side, head_size: int) -> tuple[tuple[tuple[tuple[int, int], ...], ...], ...]:
    """Where each code lies in a unit: `[token 0..15][channel][bit]` -> (32-bit word of the unit, shift in it)."""
    words, base = fmt.words(side, head_size), 0 if side == "key" else fmt.value_offset(head_size) // 4
    table: list[list[tuple[tuple[int, int], ...]]] = [[() for _ in range(head_size)] for _ in range(UNIT_TOKENS)]
    first_channel = first_word = 0
    for bits, channels in zip(fmt.bits(side), fmt.segments(side, head_size)):
        registers = channels // 8
        for token in range(UNIT_TOKENS):
            for channel in range(channels):
                if side == "key":
                    group, half = token % 8, token // 8
                    register = half * (registers // 2) + channel // 16
                    column, byte = channel % 16 // 4, channel % 4
                else:
                    group, register = channel % 8, channel // 8
                    column, byte = token % 8 // 2, VALUE_BYTE_TOKENS.index(token % 2 + token // 8 * 8)
                lane = 4 * group + column
                table[token][first_channel + channel] = tuple(
                    (base + _word_offset(first_word + word, words, lane) // 4, shift + 4 * byte)
                    for word, shift in _register_bits(bits, register, registers)
                )
        first_channel += channels
        first_word += _class_words(bits, registers)
    return tuple(tuple(row) for row in table)


def scale_position(fmt: Format, side: Side, token: int, head_size: int) -> int:
    """Byte offset in a unit of a token's two scale bytes: eight groups of {key g, key g+8, value g, value g+8}."""
    return fmt.scale_offset(head_size) + 8 * (token % 8) + 4 * SIDES.index(side) + 2 * (token // 8)
