// Packed codes to 8-bit levels, one register of several lanes at a time, for any instruction set.
#pragma once

#include <utility>

#include "codebook.h"
#include "cpu_simd.h"
#include "layout.h"

namespace mq::cpu {

constexpr int kBlockUnits = 4;  // decoded together; their attention weights share one scale
constexpr int kBlockTokens = kBlockUnits * kUnitTokens;

// Levels are integers once doubled at 4 bits, where they are half-integers.
constexpr int level_factor(int bits) { return bits == 4 ? 2 : 1; }

// What a decoded level is worth at scale 1.
constexpr float level_value(int bits) {
    const float unit = bits == 2 ? Codebook<2>::unit : bits == 3 ? Codebook<3>::unit : Codebook<4>::unit;
    return 1.0f / (unit * float(level_factor(bits)));
}

// Levels by nibble. Bits beside the code belong to others, so every nibble with the same code has the same level.
struct NibbleTable {
    int8_t level[16];
};

template <int kBits, int kShift>
constexpr NibbleTable nibble_table() {
    NibbleTable table{};
    for (int nibble = 0; nibble < 16; ++nibble) {
        int code = nibble >> kShift & ((1 << kBits) - 1);
        if (kBits == 4) code = nibble < 8 ? nibble + 8 : 15 - nibble;  // sign and magnitude
        table.level[nibble] = int8_t(Codebook<kBits>::levels[code] * level_factor(kBits));
    }
    return table;
}

// The levels of one register for several lanes. `Isa` has `Words` (a 32-bit word a lane), `Levels` (4 bytes a lane) and
// `lookup<kHalf>(words, table)`: the table's byte for each nibble of the words' low (0) or high (1) half.
template <class Isa, int kBits, int kRegister, int kRegisters>
inline typename Isa::Levels decode_register(const typename Isa::Words* words) {
    constexpr BitPlace place = bit_place(kBits, kRegister, kRegisters, 0, 0);
    constexpr int half = place.shift / 16, shift = place.shift % 16;
    if constexpr (shift == 3) {  // bit k of the code is bit 3 of the nibbles of word k
        const auto* w = words + place.word;
        const typename Isa::Words code =
            (w[0] >> 3 & 0x11111111u) | (w[1] >> 2 & 0x22222222u) | (w[2] >> 1 & 0x44444444u);
        return Isa::template lookup<half>(code, nibble_table<kBits, 0>());
    } else {
        return Isa::template lookup<half>(words[place.word], nibble_table<kBits, shift>());
    }
}

// Calls `emit(class, pair, first, second)` with the levels of each pair of registers of one side's `words`: keys pair
// the registers of 16 channels of tokens g and g + 8; values those of channels g and g + 8 of 16.
template <class Isa, class Side, bool kKeys, int kClass, class Emit, size_t... kPairs>
inline void decode_class(const typename Isa::Words* words, const Emit& emit, std::index_sequence<kPairs...>) {
    constexpr int bits = Side::bits(kClass), registers = Side::registers(kClass);
    constexpr int step = kKeys ? 1 : 2, distance = kKeys ? registers / 2 : 1;
    const auto* own = words + Side::first_word(kClass);
    (emit(kClass, int(kPairs), decode_register<Isa, bits, step * int(kPairs), registers>(own),
          decode_register<Isa, bits, step * int(kPairs) + distance, registers>(own)),
     ...);
}

template <class Isa, class Side, bool kKeys, class Emit>
inline void decode_pairs(const typename Isa::Words* words, const Emit& emit) {
    decode_class<Isa, Side, kKeys, 0>(words, emit, std::make_index_sequence<Side::registers(0) / 2>());
    if constexpr (Side::classes == 2) {
        decode_class<Isa, Side, kKeys, 1>(words, emit, std::make_index_sequence<Side::registers(1) / 2>());
    }
}

}  // namespace mq::cpu
