// Tiles for any other CPU: the compiler's own vectors. Levels are widened to 16 bits, and the products are plain loops
// over int16, which GCC turns into pairwise multiply-adds (vpmaddwd on AVX2, pmaddwd on SSE2).
#pragma once

#include <cmath>

#include "cpu_decode.h"

namespace mq::cpu {

struct Portable {
    typedef uint32_t Words __attribute__((vector_size(16)));
    typedef int8_t Levels __attribute__((vector_size(16)));

    template <int kHalf>
    static Levels lookup(Words words, NibbleTable table) {
        const Words half = kHalf ? words >> 16 : words & 0xffffu;
        const Words bytes = (half | half << 8) & 0x00ff00ffu;
        const Levels nibbles = (Levels)((bytes | bytes << 4) & 0x0f0f0f0fu);
        Levels levels;
        std::memcpy(&levels, table.level, sizeof levels);
        return __builtin_shuffle(levels, nibbles);
    }
};

// `emit(class, g, pair, first, second)`: two registers' 16 bytes of the lanes 4 g .. 4 g + 3.
template <class Side, bool kKeys, class Emit>
inline void decode_rows(const uint8_t* codes, const Emit& emit) {
    for (int g = 0; g < 8; ++g) {
        Portable::Words words[Side::words];
        for (int w = 0; w < Side::words; ++w) {
            for (int c = 0; c < 4; ++c) {
                uint32_t word;
                std::memcpy(&word, codes + word_offset(w, Side::words, 4 * g + c), sizeof word);
                words[w][c] = word;
            }
        }
        decode_pairs<Portable, Side, kKeys>(words, [&](int cls, int pair, Portable::Levels a, Portable::Levels b) {
            emit(Side::first_channel(cls) / 16 + pair, g, a, b);
        });
    }
}

inline void widen(Portable::Levels levels, int16_t* out) {
    for (int i = 0; i < 16; ++i) out[i] = levels[i];
}

// The integers of `count` numbers, and what one of them is worth.
inline float to_integers(const float* from, int count, int limit, int16_t* to) {
    float most = 0;
    for (int i = 0; i < count; ++i) most = std::fabs(from[i]) > most ? std::fabs(from[i]) : most;
    const float factor = most > 0 ? float(limit) / most : 0.0f;
    for (int i = 0; i < count; ++i) to[i] = int16_t(std::lrintf(from[i] * factor));
    return most / float(limit);
}

inline int32_t dot(const int16_t* a, const int16_t* b, int count) {
    int32_t total = 0;
    for (int i = 0; i < count; ++i) total += int32_t{a[i]} * b[i];
    return total;
}

template <class Side, int kRows>
struct Queries {
    static constexpr int kLimit = 32512;
    alignas(32) int16_t integers[kRows][Side::head_size];
    float scale[kRows][2];

    void set(int row, const float* query) {
        for (int cls = 0; cls < Side::classes; ++cls) {
            const int first = Side::first_channel(cls);
            scale[row][cls] = to_integers(query + first, Side::channels(cls), kLimit, integers[row] + first);
        }
    }
};

template <class Side>
struct KeyTile {
    alignas(32) int16_t levels[kBlockTokens][Side::head_size];

    void decode(int unit, const uint8_t* codes) {
        decode_rows<Side, true>(codes, [&](int group, int g, Portable::Levels first, Portable::Levels second) {
            widen(first, levels[unit * kUnitTokens + g] + 16 * group);
            widen(second, levels[unit * kUnitTokens + 8 + g] + 16 * group);
        });
    }

    template <int kRows, int kAllRows>
    void scores(int units, const Queries<Side, kAllRows>& queries, int row, const float (*key_scales)[kBlockTokens],
                float (*out)[kBlockTokens]) const {
        for (int t = 0; t < units * kUnitTokens; ++t) {
            for (int r = 0; r < kRows; ++r) {
                float total = 0;
                for (int cls = 0; cls < Side::classes; ++cls) {
                    const int first = Side::first_channel(cls);
                    const int32_t exact =
                        dot(levels[t] + first, queries.integers[row + r] + first, Side::channels(cls));
                    total += float(exact) * (key_scales[cls][t] * queries.scale[row + r][cls]);
                }
                out[r][t] = total;
            }
        }
    }
};

template <int kRows>
struct Weights {
    static constexpr int kLimit = 32767;
    alignas(32) int16_t integers[kRows][kBlockTokens];  // tokens of a unit in the order of VALUE_BYTE_TOKENS
    float scale[kRows];

    void set(int row, int units, const float* weights) {
        float ordered[kBlockTokens];
        for (int unit = 0; unit < units; ++unit) {
            const float* own = weights + unit * kUnitTokens;
            for (int i = 0; i < kUnitTokens; ++i) ordered[unit * kUnitTokens + i] = own[i / 2 + 8 * (i % 2)];
        }
        scale[row] = to_integers(ordered, units * kUnitTokens, kLimit, integers[row]);
    }
};

template <class Side>
struct ValueTile {
    alignas(32) int16_t levels[Side::head_size][kBlockTokens];

    void decode(int unit, const uint8_t* codes) {
        decode_rows<Side, false>(codes, [&](int group, int g, Portable::Levels first, Portable::Levels second) {
            widen(first, levels[16 * group + g] + unit * kUnitTokens);
            widen(second, levels[16 * group + 8 + g] + unit * kUnitTokens);
        });
    }

    template <int kRows, int kAllRows>
    void accumulate(int cls, int units, const Weights<kAllRows>& weights, int row, float* const* out) const {
        const int first = Side::first_channel(cls), last = first + Side::channels(cls);
        for (int channel = first; channel < last; ++channel) {
            for (int r = 0; r < kRows; ++r) {
                const int32_t exact = dot(levels[channel], weights.integers[row + r], units * kUnitTokens);
                out[r][channel] += float(exact) * weights.scale[row + r];
            }
        }
    }
};

}  // namespace mq::cpu
