// Codes of a tile to the words of units: whole units by plain stores, single tokens by merging bits.
#pragma once

#include <cstdint>

#include "layout.h"

namespace mq {

// A lane's codes of one side to its words. `pairs[i]` holds registers 2 i (low half) and 2 i + 1 of the page, each four
// codes as nibbles. The same for keys and values, which differ only in what a register holds.
template <class Side>
__device__ __forceinline__ void pack_words(uint32_t (&words)[Side::words],
                                           const uint32_t (&pairs)[Side::head_size / 16]) {
#pragma unroll
    for (int w = 0; w < Side::words; ++w) words[w] = 0u;
#pragma unroll
    for (int cls = 0; cls < Side::classes; ++cls) {
        const int bits = Side::bits(cls), count = Side::registers(cls), first = Side::first_channel(cls) / 8;
#pragma unroll
        for (int reg = 0; reg < count; reg += 2) {  // registers 2 i and 2 i + 1 always share a word, 16 bits apart
            const uint32_t pair = pairs[(first + reg) / 2];
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
template <class Word>
__device__ __forceinline__ void merge(uint8_t* address, Word bits, Word mask) {
    auto* word = reinterpret_cast<Word*>(address);
    if (mask == 0) return;
    if (mask == ~Word{0}) {
        *word = bits;
    } else {
        atomicAnd(word, ~mask);
        atomicOr(word, bits);
    }
}

// The same with a lane's words of a side, two at a time where they are neighbours.
template <int kWords>
__device__ __forceinline__ void merge_words(const uint32_t (&words)[kWords], const uint32_t (&masks)[kWords],
                                            uint8_t* side, int lane) {
    using Pair = unsigned long long;
#pragma unroll
    for (int w = 0; w + 1 < kWords; w += 2)
        merge<Pair>(side + word_offset(w, kWords, lane), words[w] | Pair{words[w + 1]} << 32,
                    masks[w] | Pair{masks[w + 1]} << 32);
    if constexpr (kWords % 2 == 1)
        merge<unsigned>(side + word_offset(kWords - 1, kWords, lane), words[kWords - 1], masks[kWords - 1]);
}

// A tile's codes of keys in the page's order of registers: register h * blocks + b of a class is row g + 8 h of block
// b, the low or the high half of the block's word.
template <class Side>
__device__ __forceinline__ void key_pairs(uint32_t (&pairs)[Side::head_size / 16],
                                          const uint32_t (&codes)[Side::head_size / 16]) {
#pragma unroll
    for (int cls = 0; cls < Side::classes; ++cls) {
        const int first = Side::first_channel(cls) / 16, blocks = Side::channels(cls) / 16;
#pragma unroll
        for (int i = 0; i < blocks; ++i) {
            const int low = 2 * i, high = 2 * i + 1;
            pairs[first + i] = __byte_perm(codes[first + low % blocks], codes[first + high % blocks],
                                           (low < blocks ? 0x0010u : 0x0032u) | (high < blocks ? 0x5400u : 0x7600u));
        }
    }
}

// The lane's codes of one key token (its row 0 or 1), which belong to half `kHalf` of the unit's tokens, into the unit.
template <class Side, int kHalf>
__device__ __forceinline__ void scatter_key_half(const uint32_t (&codes)[Side::head_size / 16], int row, uint8_t* side,
                                                 int lane) {
    constexpr int kBlocks = Side::head_size / 16;
    constexpr uint32_t kKeep = kHalf == 0 ? 0x0000ffffu : 0xffff0000u;
    uint32_t placed[kBlocks], present[kBlocks];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
        const int bits = Side::bits(16 * block < Side::channels(0) ? 0 : 1);
        // The row's codes in both halves of a word, of which one stays.
        placed[block] = __byte_perm(codes[block], 0u, row == 0 ? 0x1010u : 0x3232u) & kKeep;
        present[block] = 0x11111111u * ((1u << bits) - 1u) & kKeep;
    }
    uint32_t pairs[kBlocks], words[Side::words], masks[Side::words];
    key_pairs<Side>(pairs, placed);
    pack_words<Side>(words, pairs);
    key_pairs<Side>(pairs, present);
    pack_words<Side>(masks, pairs);
    merge_words(words, masks, side, lane);
}

template <class Side>
__device__ __forceinline__ void scatter_key_row(const uint32_t (&codes)[Side::head_size / 16], int row, uint8_t* side,
                                                int token, int c) {
    const int lane = 4 * (token % 8) + c;
    if (token < 8)
        scatter_key_half<Side, 0>(codes, row, side, lane);
    else
        scatter_key_half<Side, 1>(codes, row, side, lane);
}

// One value token of a tile into its unit. The lane has channels 2 c and 2 c + 1 of every eight; each goes to one byte
// of the words of another lane of the page.
template <class Side>
__device__ __forceinline__ void scatter_value_row(const uint32_t (&codes)[Side::head_size / 16], int row, uint8_t* side,
                                                  int token, int c) {
    constexpr int kBlocks = Side::head_size / 16;
    const int byte_shift = kBitsPerRegisterByte * value_place(token, 0).byte;
    uint32_t pairs[kBlocks], masks[Side::words];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
        pairs[block] = 0x00010001u * ((1u << Side::bits(16 * block < Side::channels(0) ? 0 : 1)) - 1u);
    pack_words<Side>(masks, pairs);
#pragma unroll
    for (uint32_t& mask : masks) mask <<= byte_shift;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        uint32_t words[Side::words];
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            const uint32_t tiles = codes[block] >> (16 * e + 4 * row);  // n tile 0 in nibble 0, n tile 1 in nibble 2
            pairs[block] = (tiles & 0xfu) | (tiles & 0xf00u) << 8;
        }
        pack_words<Side>(words, pairs);
#pragma unroll
        for (uint32_t& word : words) word <<= byte_shift;
        merge_words(words, masks, side, value_place(token, 2 * c + e).lane);
    }
}

}  // namespace mq
