// Tiles for AVX-512: VBMI expands and looks up 64 codes in two instructions, VNNI multiplies bytes. The 16-bit integers
// of queries and weights are split into two bytes, and each half is a product of its own.
#pragma once

#include <immintrin.h>

#include "cpu_decode.h"

namespace mq::cpu {

struct Avx512 {
    typedef uint32_t Words __attribute__((vector_size(64)));
    typedef Words Levels;

    template <int kHalf>
    static Levels lookup(Words words, NibbleTable table) {
        // Byte i of a 64-bit lane becomes the eight bits from the i-th of these onwards: a nibble and its neighbour.
        // The permute looks at six of them, which the table, repeated four times, allows.
        constexpr int64_t from = 0x2c2824200c080400 + 0x1010101010101010 * kHalf;
        const __m512i nibbles = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(from), (__m512i)words);
        __m128i levels;
        std::memcpy(&levels, table.level, sizeof levels);
        return (Levels)_mm512_permutexvar_epi8(nibbles, _mm512_broadcast_i32x4(levels));
    }
};

// One side's words of a unit: `words[h][w]` holds word w of the lanes 4 g + c with g = 4 h + i at dword 4 c + i.
template <class Side>
inline void load_words(const uint8_t* codes, Avx512::Words (&words)[2][Side::words]) {
    constexpr int quads = Side::words / 4, rest = Side::words % 4;
    const auto at = [&](int offset) { return _mm512_loadu_si512(codes + offset); };
    for (int h = 0; h < 2; ++h) {
        for (int q = 0; q < quads; ++q) {
            const int base = q * 512 + h * 256;
            const __m512i a = at(base), b = at(base + 64), c = at(base + 128), d = at(base + 192);
            const __m512i ab01 = _mm512_unpacklo_epi32(a, b), ab23 = _mm512_unpackhi_epi32(a, b);
            const __m512i cd01 = _mm512_unpacklo_epi32(c, d), cd23 = _mm512_unpackhi_epi32(c, d);
            words[h][4 * q + 0] = (Avx512::Words)_mm512_unpacklo_epi64(ab01, cd01);
            words[h][4 * q + 1] = (Avx512::Words)_mm512_unpackhi_epi64(ab01, cd01);
            words[h][4 * q + 2] = (Avx512::Words)_mm512_unpacklo_epi64(ab23, cd23);
            words[h][4 * q + 3] = (Avx512::Words)_mm512_unpackhi_epi64(ab23, cd23);
        }
        if constexpr (rest >= 2) {
            const __m512i first = _mm512_setr_epi32(0, 8, 16, 24, 2, 10, 18, 26, 4, 12, 20, 28, 6, 14, 22, 30);
            const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(1));
            const __m512i a = at(quads * 512 + h * 128), b = at(quads * 512 + h * 128 + 64);
            words[h][4 * quads] = (Avx512::Words)_mm512_permutex2var_epi32(a, first, b);
            words[h][4 * quads + 1] = (Avx512::Words)_mm512_permutex2var_epi32(a, second, b);
        }
        if constexpr (rest % 2 == 1) {
            constexpr int last = Side::words - 1;
            const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            words[h][last] = (Avx512::Words)_mm512_permutexvar_epi32(order, at(last * 128 + h * 64));
        }
    }
}

// `emit(class, pair, vectors)`, where vector c holds 16 rows of 4 bytes: rows g and 8 + g are the first and second
// register's bytes in lane 4 g + c.
template <class Side, bool kKeys, class Emit>
inline void decode_rows(const uint8_t* codes, const Emit& emit) {
    Avx512::Words words[2][Side::words];
    load_words<Side>(codes, words);
    // The upper lanes' registers wait here for the lower ones': a unit's levels, at most 16 KiB.
    Avx512::Levels low[2][Side::head_size / 16][2];
    for (int h = 0; h < 2; ++h) {
        decode_pairs<Avx512, Side, kKeys>(words[h], [&](int cls, int pair, Avx512::Levels a, Avx512::Levels b) {
            low[h][Side::first_channel(cls) / 16 + pair][0] = a;
            low[h][Side::first_channel(cls) / 16 + pair][1] = b;
        });
    }
    for (int group = 0; group < Side::head_size / 16; ++group) {
        const __m512i a = (__m512i)low[0][group][0], b = (__m512i)low[1][group][0];
        const __m512i c = (__m512i)low[0][group][1], d = (__m512i)low[1][group][1];
        const __m512i ab01 = _mm512_shuffle_i32x4(a, b, 0x44), ab23 = _mm512_shuffle_i32x4(a, b, 0xee);
        const __m512i cd01 = _mm512_shuffle_i32x4(c, d, 0x44), cd23 = _mm512_shuffle_i32x4(c, d, 0xee);
        emit(group, 0, _mm512_shuffle_i32x4(ab01, cd01, 0x88));
        emit(group, 1, _mm512_shuffle_i32x4(ab01, cd01, 0xdd));
        emit(group, 2, _mm512_shuffle_i32x4(ab23, cd23, 0x88));
        emit(group, 3, _mm512_shuffle_i32x4(ab23, cd23, 0xdd));
    }
}

template <class Side, int kRows>
struct Queries {
    // The high byte must fit int8 once the low byte is taken as signed: 127 * 256.
    static constexpr int kLimit = 32512;
    int32_t high[kRows][Side::head_size / 4];  // four int8 each
    int32_t low[kRows][Side::head_size / 4];
    int32_t offset[kRows][2];  // takes back the 128 added to every level
    float scale[kRows][2];

    void set(int row, const float* query) {
        auto* high_bytes = reinterpret_cast<int8_t*>(high[row]);
        auto* low_bytes = reinterpret_cast<int8_t*>(low[row]);
        for (int cls = 0; cls < Side::classes; ++cls) {
            const int first = Side::first_channel(cls), last = first + Side::channels(cls);
            __m512 largest = _mm512_setzero_ps();
            for (int d = first; d < last; d += 16) {
                largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(query + d)));
            }
            const float most = _mm512_reduce_max_ps(largest);
            const __m512 factor = _mm512_set1_ps(most > 0 ? kLimit / most : 0.0f);
            __m512i total = _mm512_setzero_si512();
            for (int d = first; d < last; d += 16) {
                const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(query + d), factor));
                const __m512i rounded = _mm512_add_epi32(q, _mm512_set1_epi32(128));
                _mm_storeu_si128((__m128i*)(high_bytes + d), _mm512_cvtepi32_epi8(_mm512_srai_epi32(rounded, 8)));
                _mm_storeu_si128((__m128i*)(low_bytes + d), _mm512_cvtepi32_epi8(q));
                total = _mm512_add_epi32(total, q);
            }
            offset[row][cls] = -128 * _mm512_reduce_add_epi32(total);
            scale[row][cls] = most / kLimit;
        }
    }
};

template <class Side>
struct KeyTile {
    alignas(64) uint8_t levels[kBlockUnits][Side::head_size / 4][64];  // [unit][4 channels][token, channel], plus 128

    void decode(int unit, const uint8_t* codes) {
        decode_rows<Side, true>(codes, [&](int group, int quad, __m512i v) {
            _mm512_store_si512(levels[unit][4 * group + quad], _mm512_xor_si512(v, _mm512_set1_epi8(char(0x80))));
        });
    }

    // scores[r][t] of rows `row` to `row + kRows - 1` and the block's first `units` units; `key_scales[class][t]`.
    template <int kRows, int kAllRows>
    void scores(int units, const Queries<Side, kAllRows>& queries, int row, const float (*key_scales)[kBlockTokens],
                float (*out)[kBlockTokens]) const {
        for (int unit = 0; unit < units; ++unit) {
            __m512 total[kRows] = {};
            for (int cls = 0; cls < Side::classes; ++cls) {
                __m512i high[kRows], low[kRows];
                for (int r = 0; r < kRows; ++r) {
                    high[r] = _mm512_setzero_si512();
                    low[r] = _mm512_set1_epi32(queries.offset[row + r][cls]);
                }
                const int first = Side::first_channel(cls) / 4, last = first + Side::channels(cls) / 4;
                for (int quad = first; quad < last; ++quad) {
                    const __m512i key = _mm512_load_si512(levels[unit][quad]);
                    for (int r = 0; r < kRows; ++r) {
                        high[r] = _mm512_dpbusd_epi32(high[r], key, _mm512_set1_epi32(queries.high[row + r][quad]));
                        low[r] = _mm512_dpbusd_epi32(low[r], key, _mm512_set1_epi32(queries.low[row + r][quad]));
                    }
                }
                const __m512 key_scale = _mm512_loadu_ps(key_scales[cls] + unit * kUnitTokens);
                for (int r = 0; r < kRows; ++r) {
                    // Modulo 2^32 on the way, but the sum itself fits.
                    const __m512i exact = _mm512_add_epi32(_mm512_slli_epi32(high[r], 8), low[r]);
                    const __m512 scale = _mm512_mul_ps(key_scale, _mm512_set1_ps(queries.scale[row + r][cls]));
                    const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), scale);
                    total[r] = _mm512_add_ps(total[r], part);
                }
            }
            for (int r = 0; r < kRows; ++r) _mm512_storeu_ps(out[r] + unit * kUnitTokens, total[r]);
        }
    }
};

template <int kRows>
struct Weights {
    static constexpr int kLimit = 32767;
    int32_t high[kRows][kBlockTokens / 4];  // four uint8 each, tokens in the order of VALUE_BYTE_TOKENS
    int32_t low[kRows][kBlockTokens / 4];
    float scale[kRows];

    void set(int row, int units, const float* weights) {
        __m512 largest = _mm512_setzero_ps();
        for (int unit = 0; unit < units; ++unit) {
            largest = _mm512_max_ps(largest, _mm512_loadu_ps(weights + unit * kUnitTokens));
        }
        const float most = _mm512_reduce_max_ps(largest);
        const __m512 factor = _mm512_set1_ps(most > 0 ? kLimit / most : 0.0f);
        const __m512i order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
        for (int unit = 0; unit < units; ++unit) {
            const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(weights + unit * kUnitTokens), factor);
            const __m512i w = _mm512_permutexvar_epi32(order, _mm512_cvtps_epi32(scaled));
            _mm_storeu_si128((__m128i*)&high[row][4 * unit], _mm512_cvtepi32_epi8(_mm512_srli_epi32(w, 8)));
            _mm_storeu_si128((__m128i*)&low[row][4 * unit], _mm512_cvtepi32_epi8(w));
        }
        scale[row] = most / kLimit;
    }
};

template <class Side>
struct ValueTile {
    // [unit][4 tokens][16 channels][channel, token]
    alignas(64) int8_t levels[kBlockUnits][4][Side::head_size / 16][64];

    void decode(int unit, const uint8_t* codes) {
        decode_rows<Side, false>(codes, [&](int group, int quad, __m512i v) {
            _mm512_store_si512(levels[unit][quad][group], v);
        });
    }

    // out[r][channel] += weights @ levels for the channels of a class.
    template <int kRows, int kAllRows>
    void accumulate(int cls, int units, const Weights<kAllRows>& weights, int row, float* const* out) const {
        int group = Side::first_channel(cls) / 16;
        const int last = group + Side::channels(cls) / 16;
        for (; group + 2 <= last; group += 2) accumulate_groups<kRows, 2>(group, units, weights, row, out);
        if (group < last) accumulate_groups<kRows, 1>(group, units, weights, row, out);
    }

  private:
    template <int kRows, int kGroups, int kAllRows>
    void accumulate_groups(int group, int units, const Weights<kAllRows>& weights, int row, float* const* out) const {
        __m512i high[kRows][kGroups], low[kRows][kGroups];
        for (int r = 0; r < kRows; ++r) {
            for (int g = 0; g < kGroups; ++g) high[r][g] = low[r][g] = _mm512_setzero_si512();
        }
        for (int quad = 0; quad < 4 * units; ++quad) {
            __m512i value[kGroups];
            for (int g = 0; g < kGroups; ++g) value[g] = _mm512_load_si512(levels[quad / 4][quad % 4][group + g]);
            for (int r = 0; r < kRows; ++r) {
                const __m512i h = _mm512_set1_epi32(weights.high[row + r][quad]);
                const __m512i l = _mm512_set1_epi32(weights.low[row + r][quad]);
                for (int g = 0; g < kGroups; ++g) {
                    high[r][g] = _mm512_dpbusd_epi32(high[r][g], h, value[g]);
                    low[r][g] = _mm512_dpbusd_epi32(low[r][g], l, value[g]);
                }
            }
        }
        for (int r = 0; r < kRows; ++r) {
            const __m512 scale = _mm512_set1_ps(weights.scale[row + r]);
            for (int g = 0; g < kGroups; ++g) {
                float* to = out[r] + 16 * (group + g);
                const __m512i exact = _mm512_add_epi32(_mm512_slli_epi32(high[r][g], 8), low[r][g]);
                _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), scale, _mm512_loadu_ps(to)));
            }
        }
    }
};

}  // namespace mq::cpu
