// The store's arithmetic on one block of a tile: 16 rows x 16 channels in C-fragment layout, to codes.
//
// It runs two elements an instruction. |y| is rounded to fp16 and compared with boundaries times the vector's standard
// deviation, rounded too: that spares a product per element. The decision can differ from fp32's where y is within
// `tie` (manthanquant/cuda/store.py) of a boundary, where both codes cost the same to second order. A level is a
// staircase: each comparison, 0 or 1, adds a rise.
#pragma once

#include <cuda_fp16.h>

#include <type_traits>

#include "codebook.h"
#include "layout.h"
#include "ptx.cuh"

namespace mq {

__device__ __forceinline__ __half2 both_halves(float x) { return __float2half2_rn(x); }

// The sum over lanes 4 g to 4 g + 3, in all four.
__device__ __forceinline__ float sum_of_four_lanes(float x) {
    x += __shfl_xor_sync(kFullWarp, x, 1);
    return x + __shfl_xor_sync(kFullWarp, x, 2);
}

// Two elements quantised.
struct QuantizedPair {
    __half2 level;  // with y's sign, in units of 1 / Quantizer::kUnit
    uint32_t code;  // in the low byte of each half; see Quantizer::nibbles
};

template <int kBits>
struct Quantizer {
    using Book = Codebook<kBits>;
    static constexpr int kHalf = Book::count / 2;
    // 4-bit levels are half-integers: twice them are whole, and fit fp16 even with a rank times 256 on top.
    static constexpr float kLevelScale = kBits == 4 ? 2.f : 1.f;
    static constexpr float kUnit = Book::unit * kLevelScale;

    // The boundaries above 0 of a vector whose elements have standard deviation `sigma`.
    using Boundaries = __half2[kHalf - 1];
    __device__ static __forceinline__ void scale_boundaries(Boundaries& boundaries, float sigma) {
        constexpr Steps kSteps = steps();
#pragma unroll
        for (int i = 0; i < kHalf - 1; ++i) boundaries[i] = both_halves(kSteps.boundary[i] * sigma);
    }

    // `y`: two elements, as fp16. `kHighNibble`: where in its byte the code goes.
    template <bool kHighNibble>
    __device__ static __forceinline__ QuantizedPair pair(uint32_t y, const Boundaries& boundaries) {
        constexpr Steps kSteps = steps();
        constexpr uint32_t kSigns = 0x80008000u;
        const __half2 size = __habs2(half2_of(y));
        __half2 level = both_halves(kSteps.first_level);
#pragma unroll
        for (int i = 0; i < kHalf - 1; ++i)
            level = __hfma2(__hgt2(size, boundaries[i]), both_halves(kSteps.rise[i]), level);
        if constexpr (kBits == 4) {
            // Take the rank off the level again. Adding 1.5 * 2^10 rounds to a whole number, in the lowest bits.
            constexpr float kRound = 1536.f;
            constexpr uint32_t kSignPlace = 0x00080008u;
            const __half2 whole = __hfma2(level, both_halves(1.f / kRankStep), both_halves(kRound));
            level = __hfma2(__hsub2(whole, both_halves(kRound)), both_halves(-kRankStep), level);
            const uint32_t code = (y >> 12 & kSignPlace) | (bits_of(whole) & ~kSignPlace);
            return {half2_of(bits_of(level) | (y & kSigns)), code};
        } else {
            // 8 +- slope * level, rounded, has the code in the highest bits of its nibble. A leading 2^10 puts it into
            // the lowest bits of the number.
            constexpr float kPlace = kHighNibble ? 16.f : 1.f;
            level = half2_of(bits_of(level) | (y & kSigns));
            return {level, bits_of(__hfma2(level, both_halves(kPlace * kSlope), both_halves(1024.f + kPlace * 8.f)))};
        }
    }

    // The codes in the low nibbles of bytes `low` and the high nibbles of bytes `high` (4 bits: low ones too), as
    // nibbles of one word, as the page stores them (4 bits: sign-magnitude).
    __device__ static __forceinline__ uint32_t nibbles(uint32_t low, uint32_t high) {
        constexpr uint32_t kLow = 0x0f0f0f0fu, kMask = 0x11111111u * (Book::count - 1);
        if constexpr (kBits == 4) high <<= 4;
        const uint32_t both = (low & kLow) | (high & ~kLow);
        return kBits == 4 ? both : both >> (4 - kBits) & kMask;
    }

private:
    static constexpr float kRankStep = 256.f;
    // The positive half of the codebook as a staircase. 4 bits: each step also adds kRankStep, which carries the rank
    // of the level along.
    struct Steps {
        float first_level;
        float boundary[kHalf];  // at unit variance
        float rise[kHalf];
    };
    static constexpr Steps steps() {
        Steps result{Book::levels[kHalf] * kLevelScale, {}, {}};
        for (int i = 0; i < kHalf - 1; ++i) {
            result.boundary[i] = Book::boundaries[kHalf + i];
            result.rise[i] = (Book::levels[kHalf + i + 1] - Book::levels[kHalf + i]) * kLevelScale +
                             (kBits == 4 ? kRankStep : 0.f);
        }
        return result;
    }

    // A slope such that the highest bits of the nibble 8 +- slope * level are the code, by a margin that rounding to
    // whole numbers and to fp16 does not use up.
    static constexpr float slope() {
        constexpr float kStep = 0x1p-12f, kMargin = 0.05f;
        constexpr int kCell = 16 / Book::count;
        for (int i = 1; i < 4096; ++i) {
            bool fits = true;
            for (int rank = 0; rank < kHalf; ++rank) {
                const float x = i * kStep * Book::levels[kHalf + rank];
                // 8 + x lies in the cell above, 8 - x in the one below, each from half a number before its first whole
                // number to half a number behind its last.
                const float least = kCell * rank + 0.5f, most = kCell * (rank + 1) - 0.5f;
                fits = fits && x > least + kMargin && x < most - kMargin;
            }
            if (fits) return i * kStep;
        }
        return 0.f;
    }
    static constexpr float kSlope = kBits == 4 ? 0.f : slope();
    static_assert(kBits == 4 || kSlope > 0.f, "this codebook's levels do not tell its codes apart");
};

// <y, level> of each row, summed over blocks on the tensor cores: of the products of all rows' values with all rows'
// levels only the diagonal is wanted, and it costs two instructions a block.
struct RowDots {
    float low[4] = {}, high[4] = {};  // rows 0-7 x rows 0-7, rows 8-15 x rows 8-15

    // A block of Y as an A fragment, and its pairs [n tile][row g or g + 8].
    __device__ __forceinline__ void add(const uint32_t (&y)[4], const QuantizedPair (&q)[2][2]) {
        mma_16bit<__half>(low, y, bits_of(q[0][0].level), bits_of(q[1][0].level));
        mma_16bit<__half>(high, y, bits_of(q[0][1].level), bits_of(q[1][1].level));
    }

    // Row g (0) or g + 8 (1), in all four lanes of g.
    __device__ __forceinline__ float row(int which, int lane) const {
        const int g = lane / 4;
        const float* c = which == 0 ? low : high + 2;  // rows g + 8 are the last two elements
        return __shfl_sync(kFullWarp, g % 2 == 0 ? c[0] : c[1], 4 * g + g / 2);
    }
};

// fp32 scales of a row, one a class, to its two bytes in the page.
template <int kClasses>
__device__ __forceinline__ uint16_t scale_bytes(const float (&scale)[kClasses]) {
    constexpr float kFp16Max = 65504.f;
    if constexpr (kClasses == 1) {
        return __half_as_ushort(__float2half_rn(fminf(scale[0], kFp16Max)));
    } else {
        uint16_t both = 0;
#pragma unroll
        for (int cls = 0; cls < 2; ++cls) {
            constexpr float kE4m4Max = 1.9375f, kDown = 1.f / (1 << kE4m4Exponent);
            const uint32_t pattern = __half_as_ushort(__float2half_rn(fminf(scale[cls] * kDown, kE4m4Max)));
            both |= min((pattern + (1u << (kE4m4Shift - 1))) >> kE4m4Shift, 255u) << (8 * cls);
        }
        return both;
    }
}

}  // namespace mq
