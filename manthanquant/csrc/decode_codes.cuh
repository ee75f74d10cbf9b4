// Codes to int8: words of a unit to the registers that the matrix instructions take, by byte permutes.
//
// A code is at most four bits, so a 32-bit word masked to one code a nibble is a PRMT selector for four elements in
// its low half and four in its high half. The table is the codebook, eight bytes in two registers. What is left is
// bringing the high selectors down, which `high_half` does off the integer pipe.
//
// 4-bit codes are sign-magnitude and their levels half-integers: element = level + 63.5, a byte in 0..127, so that
// x -> 127 - x (an XOR with 0x7f) negates the level. Who multiplies such elements takes 63.5 * sum(other factor) off.
#pragma once

#include "codebook.h"
#include "layout.h"
#include "ptx.cuh"

namespace mq {

// What is added to a level to make an element, times two.
template <int kBits>
constexpr int kTwiceElementOffset = kBits == 4 ? 127 : 0;

namespace detail {

// Four consecutive elements, code `first` onwards, as the bytes of a PRMT table. Four bits: by magnitude.
template <int kBits>
constexpr uint32_t table_word(int first) {
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) {
        const int code = (kBits == 4 ? 8 : 0) + first + i;
        const float element = Codebook<kBits>::levels[code] + 0.5f * kTwiceElementOffset<kBits>;
        word |= (static_cast<uint32_t>(static_cast<int>(element)) & 0xffu) << (8 * i);
    }
    return word;
}

constexpr uint32_t kTop = 0x80808080u;
constexpr uint32_t kSelectorMask = 0x77777777u;  // three index bits a nibble; bit 3 would ask PRMT for a sign

}  // namespace detail

// What decoding needs in registers all the time: one half of each codebook's table (the other is part of the
// instruction) and the constant of `high_half`. Only what a format uses takes a register.
struct Decoder {
    uint32_t negative_zero;
    uint32_t table_2bit, table_3bit_low, table_4bit_low, signs_4bit;

    // Collective over a warp.
    __device__ __forceinline__ explicit Decoder(uint32_t negative_zero)
        : negative_zero(negative_zero), table_2bit(pinned(detail::table_word<2>(0))),
          table_3bit_low(pinned(detail::table_word<3>(0))),
          table_4bit_low(pinned(detail::table_word<4>(0) ^ detail::kTop)), signs_4bit(pinned(detail::kTop)) {}

    __device__ __forceinline__ uint32_t high(uint32_t x) const { return high_half(x, negative_zero); }

    // One word of 3-bit codes that lie as nibbles to two registers.
    __device__ __forceinline__ void nibbles_3bit(uint32_t word, uint32_t* elements) const {
        constexpr uint32_t kHigh = detail::table_word<3>(4);
        const uint32_t selector = word & detail::kSelectorMask;
        elements[0] = prmt(table_3bit_low, kHigh, selector);
        elements[1] = prmt(table_3bit_low, kHigh, high(selector));
    }

    // Three words to eight registers: the low three bits of the nibbles are six of them, the top bits the other two.
    __device__ __forceinline__ void block_3bit(const uint32_t* words, uint32_t* elements) const {
        const uint32_t top_bits = ((words[0] >> 3) & 0x11111111u) | ((words[1] >> 2) & 0x22222222u) |
                                  ((words[2] >> 1) & 0x44444444u);
#pragma unroll
        for (int i = 0; i < 3; ++i) nibbles_3bit(words[i], elements + 2 * i);
        nibbles_3bit(top_bits, elements + 6);
    }

    // One word to two registers. The table holds element ^ 0x80; a second PRMT makes 0x80 of a positive and 0xff of a
    // negative sign (whatever the other three bits select), and their XOR is the element or 127 - element.
    __device__ __forceinline__ void word_4bit(uint32_t word, uint32_t* elements) const {
        constexpr uint32_t kHigh = detail::table_word<4>(4) ^ detail::kTop;
        const uint32_t magnitude = word & detail::kSelectorMask;
        elements[0] = prmt(table_4bit_low, kHigh, magnitude) ^ prmt(signs_4bit, signs_4bit, word);
        elements[1] = prmt(table_4bit_low, kHigh, high(magnitude)) ^ prmt(signs_4bit, signs_4bit, word >> 16);
    }

    // One word to four registers. The table is doubled, so the third selector bit, another code's, does not matter.
    __device__ __forceinline__ void word_2bit(uint32_t word, uint32_t* elements) const {
        const uint32_t selectors[2] = {word & detail::kSelectorMask, (word >> 2) & 0x33333333u};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            elements[2 * i] = prmt(table_2bit, table_2bit, selectors[i]);
            elements[2 * i + 1] = prmt(table_2bit, table_2bit, high(selectors[i]));
        }
    }

    // Registers [kFirst, kFirst + kCount) of a class of `kRegisters`, from the class's words; kFirst a multiple of 8.
    template <int kBits, int kRegisters, int kFirst, int kCount>
    __device__ __forceinline__ void registers(const uint32_t* words, uint32_t (&elements)[kCount]) const {
        static_assert(kFirst % 8 == 0 && kFirst + kCount <= kRegisters && kCount % 2 == 0);
        if constexpr (kBits == 3) {
            constexpr int kWhole = kRegisters / 8 * 8;  // registers that lie in blocks of three words
            constexpr int kInBlocks = kFirst + kCount <= kWhole ? kCount : (kFirst < kWhole ? kWhole - kFirst : 0);
            static_assert(kInBlocks % 8 == 0);
#pragma unroll
            for (int reg = 0; reg < kInBlocks; reg += 8) block_3bit(words + (kFirst + reg) / 8 * 3, elements + reg);
#pragma unroll
            for (int reg = kInBlocks; reg < kCount; reg += 2)
                nibbles_3bit(words[kWhole / 8 * 3 + (kFirst + reg - kWhole) / 2], elements + reg);
        } else if constexpr (kBits == 4) {
#pragma unroll
            for (int reg = 0; reg < kCount; reg += 2) word_4bit(words[(kFirst + reg) / 2], elements + reg);
        } else {
#pragma unroll
            for (int reg = 0; reg < kCount; reg += 4) {
                uint32_t four[4];
                word_2bit(words[(kFirst + reg) / 4], four);
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (reg + i < kCount) elements[reg + i] = four[i];
            }
        }
    }
};

// A lane's words of one side of a unit in shared memory: loads of 16, 8 and 4 bytes, free of bank conflicts.
template <int kWords>
__device__ __forceinline__ void load_words(uint32_t (&words)[kWords], const uint8_t* side, int lane) {
    constexpr int kQuads = kWords / 4 * 4;
#pragma unroll
    for (int i = 0; i < kQuads; i += 4) {
        const uint4 quad = *reinterpret_cast<const uint4*>(side + word_offset(i, kWords, lane));
        words[i] = quad.x, words[i + 1] = quad.y, words[i + 2] = quad.z, words[i + 3] = quad.w;
    }
    if constexpr (kWords % 4 >= 2) {
        const uint2 pair = *reinterpret_cast<const uint2*>(side + word_offset(kQuads, kWords, lane));
        words[kQuads] = pair.x, words[kQuads + 1] = pair.y;
    }
    if constexpr (kWords % 2 == 1)
        words[kWords - 1] = *reinterpret_cast<const uint32_t*>(side + word_offset(kWords - 1, kWords, lane));
}

// The scales of tokens g (low half) and g + 8 (high half) of one class as fp16 patterns, from a side's four bytes.
// With two classes they are to be multiplied by 2^kE4m4Exponent.
template <class Side>
__device__ __forceinline__ __half2 class_scales(uint32_t side_scales, int cls) {
    constexpr uint32_t kE4m4Mask = 0x00ff00ffu << kE4m4Shift;
    uint32_t patterns = side_scales;
    if constexpr (Side::classes == 2) {
        const int down = 8 - kE4m4Shift;  // class 1 is the upper byte
        patterns = (cls == 0 ? side_scales << kE4m4Shift : side_scales >> down) & kE4m4Mask;
    }
    return *reinterpret_cast<const __half2*>(&patterns);
}

}  // namespace mq
