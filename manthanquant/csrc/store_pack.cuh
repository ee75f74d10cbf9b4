// Codes of a tile to the words of units: whole units by plain stores, single tokens by merging bits.
#pragma once

#include <cstdint>

#include "layout.h"

namespace mq {

// Two registers of codes as bytes to nibbles: the first in the low half of a word, the second in the high half.
__device__ __forceinline__ uint32_t nibbles(uint32_t first, uint32_t second) {
    return __byte_perm(first | first >> 4, second | second >> 4, 0x6420u);
}

// Registers of codes (bytes) to a lane's words of one side. The same for keys and values, which differ only in what a
// register holds.
template <class Side, int kRegisters>
__device__ __forceinline__ void pack_words(uint32_t (&words)[Side::words], const uint32_t (&registers)[kRegisters]) {
#pragma unroll
    for (int w = 0; w < Side::words; ++w) words[w] = 0u;
#pragma unroll
    for (int cls = 0; cls < Side::classes; ++cls) {
        const int bits = Side::bits(cls), count = Side::registers(cls), first = Side::first_channel(cls) / 8;
#pragma unroll
        for (int reg = 0; reg < count; reg += 2) {  // registers 2 i and 2 i + 1 always share a word, 16 bits apart
            const uint32_t pair = nibbles(registers[first + reg], reg + 1 < count ? registers[first + reg + 1] : 0u);
            const BitPlace place = bit_place(bits, reg, count, 0, 0);
            if (bit_place(bits, reg, count, 0, bits - 1).word == place.word) {
                words[Side::first_word(cls) + place.word] |= pair << place.shift;
            } else {
#pragma unroll
                for (int bit = 0; bit < bits; ++bit) {
                    const BitPlace one = bit_place(bits, reg, count, 0, bit);
                    words[Side::first_word(cls) + one.word] |= (pair & (0x11111111u << bit)) << (one.shift - bit);
                }
            }
        }
    }
}

// A lane's words to a side of a unit, by the widest stores that the layout allows.
template <int kWords>
__device__ __forceinline__ void store_words(const uint32_t (&words)[kWords], uint8_t* side, int lane) {
    constexpr int kQuads = kWords / 4 * 4;
#pragma unroll
    for (int i = 0; i < kQuads; i += 4)
        *reinterpret_cast<uint4*>(side + word_offset(i, kWords, lane)) =
            make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    if constexpr (kWords % 4 >= 2)
        *reinterpret_cast<uint2*>(side + word_offset(kQuads, kWords, lane)) =
            make_uint2(words[kQuads], words[kQuads + 1]);
    if constexpr (kWords % 2 == 1)
        *reinterpret_cast<uint32_t*>(side + word_offset(kWords - 1, kWords, lane)) = words[kWords - 1];
}

// Puts `bits` where `mask` is set, whoever else writes to other bits of the word at the same time.
__device__ __forceinline__ void merge_word(uint32_t* word, uint32_t bits, uint32_t mask) {
    if (mask == 0u) return;
    if (mask == ~0u) {
        *word = bits;
    } else {
        atomicAnd(word, ~mask);
        atomicOr(word, bits);
    }
}

template <class Side>
__device__ __forceinline__ constexpr uint32_t code_mask(int reg) {
    const int cls = 8 * reg < Side::channels(0) ? 0 : 1;
    return 0x01010101u * ((1u << Side::bits(cls)) - 1u);
}

// One key token of a tile (row 0 or 1 of the lane) into its unit: the lane has all codes of its words' half.
template <class Side, int kRegisters>
__device__ __forceinline__ void scatter_key_row(const uint32_t (&codes)[kRegisters], int row, uint8_t* side, int token,
                                                int c) {
    const int half = token / 8, lane = 4 * (token % 8) + c;
    uint32_t placed[kRegisters], present[kRegisters];
#pragma unroll
    for (int cls = 0; cls < Side::classes; ++cls) {
        const int blocks = Side::registers(cls) / 2, first = Side::first_channel(cls) / 8;
#pragma unroll
        for (int i = 0; i < blocks; ++i) {
            const uint32_t four = row == 0 ? codes[first + i] : codes[first + blocks + i];
            const uint32_t mask = code_mask<Side>(first);
            placed[first + i] = half == 0 ? four : 0u;
            placed[first + blocks + i] = half == 0 ? 0u : four;
            present[first + i] = half == 0 ? mask : 0u;
            present[first + blocks + i] = half == 0 ? 0u : mask;
        }
    }
    uint32_t words[Side::words], masks[Side::words];
    pack_words<Side>(words, placed);
    pack_words<Side>(masks, present);
#pragma unroll
    for (int w = 0; w < Side::words; ++w)
        merge_word(reinterpret_cast<uint32_t*>(side + word_offset(w, Side::words, lane)), words[w], masks[w]);
}

// One value token of a tile into its unit. The lane has channels 2 c and 2 c + 1 of every eight; each goes to one byte
// of the words of another lane of the page.
template <class Side, int kRegisters>
__device__ __forceinline__ void scatter_value_row(const uint32_t (&codes)[kRegisters], int row, uint8_t* side,
                                                  int token, int c) {
    const int byte_shift = kBitsPerRegisterByte * value_place(token, 0).byte;
    uint32_t present[kRegisters], masks[Side::words];
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) present[i] = code_mask<Side>(i) & 0xffu;
    pack_words<Side>(masks, present);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        uint32_t placed[kRegisters], words[Side::words];
#pragma unroll
        for (int i = 0; i < kRegisters; ++i) placed[i] = codes[i] >> (8 * row + 16 * e) & 0xffu;
        pack_words<Side>(words, placed);
        const int lane = value_place(token, 2 * c + e).lane;
#pragma unroll
        for (int w = 0; w < Side::words; ++w)
            merge_word(reinterpret_cast<uint32_t*>(side + word_offset(w, Side::words, lane)), words[w] << byte_shift,
                       masks[w] << byte_shift);
    }
}

}  // namespace mq
