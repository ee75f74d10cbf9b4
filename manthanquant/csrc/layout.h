// The bytes of a cache unit, for the compiler: the constexpr twin of manthanquant/formats.py, which explains them.
//
// A unit holds 16 tokens of one KV head: key codes, value codes, scales. A page is [KV head][unit]; the units of one
// page and head are contiguous. Everything here is arithmetic on compile-time constants and serves host, CPU extension
// and CUDA kernels alike; tests compare it with formats.py bit by bit. Code levels are not here: they come from
// codebook.py as a generated header (codebook.h).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MQ_HOST_DEVICE __host__ __device__
#else
#define MQ_HOST_DEVICE
#endif

namespace mq {

constexpr int kUnitTokens = 16;
constexpr int kLanes = 32;
constexpr int kScaleBytes = 2;          // a side and token: one fp16, or two e4m4 bytes, class 0 first
constexpr int kE4m4Shift = 6;           // fp16 bits = e4m4 byte << 6 ...
constexpr int kE4m4Exponent = 6;        // ... and the scale is that fp16 times 2^6
constexpr int kScaleGroupBytes = 8;     // {key g, key g+8, value g, value g+8}, g = token % 8
constexpr int kBitsPerRegisterByte = 4;  // byte b of a register lies 4 b bits above byte 0

// A format: bits of each class of channels, most important class first; 0 means that the class is absent.
template <int kKeyBits0, int kKeyBits1, int kValueBits0, int kValueBits1>
struct Format {
    static constexpr int key_bits[2] = {kKeyBits0, kKeyBits1};
    static constexpr int value_bits[2] = {kValueBits0, kValueBits1};
};
using K3V3 = Format<3, 0, 3, 0>;
using K42V3 = Format<4, 2, 3, 0>;
using K42V42 = Format<4, 2, 4, 2>;
using K4V4 = Format<4, 0, 4, 0>;

// 32-bit words that `registers` registers of one class take. 3 bits: 8 registers in 3 words, a rest as nibbles.
MQ_HOST_DEVICE constexpr int class_words(int bits, int registers) {
    return bits == 3 ? registers / 8 * 3 + (registers % 8 + 1) / 2 : (registers * bits + 7) / 8;
}

// A bit of a code: the word of its lane and class that holds it, and its place there.
struct BitPlace {
    int word;
    int shift;
};

// Where bit `bit` of byte `byte` of a register lies; formats._register_bits says why.
MQ_HOST_DEVICE constexpr BitPlace bit_place(int bits, int reg, int registers, int byte, int bit) {
    const int byte_shift = kBitsPerRegisterByte * byte;
    if (bits == 2) {
        const int part = reg % 4;
        return {reg / 4, 16 * (part % 2) + 2 * (part / 2) + bit + byte_shift};
    }
    const int whole_blocks = bits == 3 ? registers / 8 : 0;
    if (reg < 8 * whole_blocks) {
        const int block = reg / 8, part = reg % 8;
        if (part < 6) return {3 * block + part / 2, 16 * (part % 2) + bit + byte_shift};
        return {3 * block + bit, 16 * (part - 6) + 3 + byte_shift};
    }
    const int rest = reg - 8 * whole_blocks;
    return {3 * whole_blocks + rest / 2, 16 * (rest % 2) + bit + byte_shift};
}

// Byte offset, within a side, of a lane's word: whole groups of four words, then a pair, then a single word.
MQ_HOST_DEVICE constexpr int word_offset(int word, int words, int lane) {
    const int quads = words / 4 * 4;
    if (word < quads) return word / 4 * 512 + lane * 16 + word % 4 * 4;
    if (words % 4 >= 2 && word < quads + 2) return quads * 128 + lane * 8 + (word - quads) * 4;
    return (words - 1) * 128 + lane * 4;
}

// The lane, the register (counted within the class) and the byte of one code.
struct CodePlace {
    int lane;
    int reg;
    int byte;
};

// Keys: row = token, column = channel of the A operand of Q K^T. `channel` counts within its class.
MQ_HOST_DEVICE constexpr CodePlace key_place(int token, int channel, int registers) {
    return {4 * (token % 8) + channel % 16 / 4, token / 8 * (registers / 2) + channel / 16, channel % 4};
}

// Values: row = channel, column = token of the A operand of P V; byte b is token 2 c + (0, 8, 1, 9)[b].
MQ_HOST_DEVICE constexpr CodePlace value_place(int token, int channel) {
    return {4 * (channel % 8) + token % 8 / 2, channel / 8, 2 * (token % 2) + token / 8};
}

// One side of a unit: its classes of channels, and the registers and words each lane owns of them.
template <int kBits0, int kBits1, int kHeadSize>
struct SideLayout {
    static constexpr int head_size = kHeadSize;
    static constexpr int classes = kBits1 == 0 ? 1 : 2;

    MQ_HOST_DEVICE static constexpr int bits(int cls) { return cls == 0 ? kBits0 : kBits1; }
    // Two classes split the head at a multiple of 16: half, rounded up.
    MQ_HOST_DEVICE static constexpr int channels(int cls) {
        const int first = classes == 1 ? kHeadSize : (kHeadSize + 31) / 32 * 16;
        return cls == 0 ? first : kHeadSize - first;
    }
    MQ_HOST_DEVICE static constexpr int first_channel(int cls) { return cls == 0 ? 0 : channels(0); }
    MQ_HOST_DEVICE static constexpr int registers(int cls) { return channels(cls) / 8; }
    MQ_HOST_DEVICE static constexpr int class_words(int cls) { return mq::class_words(bits(cls), registers(cls)); }
    MQ_HOST_DEVICE static constexpr int first_word(int cls) { return cls == 0 ? 0 : class_words(0); }

    static constexpr int words = class_words(0) + (classes == 2 ? class_words(1) : 0);  // of one lane
    static constexpr int bytes = words * kLanes * 4;                                    // of the side's codes
};

// A whole unit of a format and head size; offsets in bytes.
template <class F, int kHeadSize>
struct Unit {
    using Key = SideLayout<F::key_bits[0], F::key_bits[1], kHeadSize>;
    using Value = SideLayout<F::value_bits[0], F::value_bits[1], kHeadSize>;
    static constexpr int head_size = kHeadSize;
    static constexpr int value_offset = Key::bytes;
    static constexpr int scale_offset = Key::bytes + Value::bytes;
    static constexpr int bytes = scale_offset + kUnitTokens * 2 * kScaleBytes;
    static constexpr int token_bytes = bytes / kUnitTokens;
};

// Byte offset in the unit's scales of a token's two scale bytes; side 0 is the key, 1 the value.
MQ_HOST_DEVICE constexpr int scale_place(int side, int token) {
    return kScaleGroupBytes * (token % 8) + 2 * kScaleBytes * side + kScaleBytes * (token / 8);
}

}  // namespace mq
