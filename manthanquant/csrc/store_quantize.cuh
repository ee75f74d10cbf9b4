// The store's arithmetic on one block of a tile: 16 rows x 16 channels in C-fragment layout, to codes.
//
// It runs two elements an instruction. u = |y| sqrt(n) / |vector| is rounded to fp16 before it is compared with the
// (rounded) boundaries: the decision can differ from fp32's where u is within `kTie` of a boundary, where both codes
// cost the same to second order. A comparison is one saturating FMA: two different fp16 numbers near a boundary (none
// is below 0.25) are at least 2^-12 apart, so saturate((u - boundary) * 2^12) is exactly 0 or 1.
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
    __half2 magnitude;  // |u|
    __half2 level;      // unsigned, in units of 1 / Quantizer::kUnit
    uint32_t code;      // in the low byte of each half, whose lowest or highest bits it is; see Quantizer::codes
};

template <int kBits>
struct Quantizer {
    using Book = Codebook<kBits>;
    static constexpr int kHalf = Book::count / 2;
    // 4-bit levels are half-integers: twice them are whole, and fit fp16 even with a rank times 256 on top.
    static constexpr float kLevelScale = kBits == 4 ? 2.f : 1.f;
    static constexpr float kUnit = Book::unit * kLevelScale;

    // `u` is y sqrt(n) / |vector|, in fp16, signs kept.
    __device__ static __forceinline__ QuantizedPair pair(__half2 u) {
        constexpr Steps kSteps = steps();
        constexpr uint32_t kSigns = 0x80008000u;
        const __half2 magnitude = half2_of(bits_of(u) & ~kSigns);
        __half2 level = both_halves(kSteps.first_level);
#pragma unroll
        for (int i = 0; i < kHalf - 1; ++i) {
            const __half2 step = __hfma2_sat(magnitude, both_halves(kStepScale), both_halves(kSteps.minus_boundary[i]));
            level = __hfma2(step, both_halves(kSteps.rise[i]), level);
        }
        if constexpr (kBits == 4) {
            // Take the rank off the level again. Adding 1.5 * 2^10 rounds to a whole number, in the lowest bits.
            constexpr float kRound = 1536.f;
            constexpr uint32_t kSignPlace = 0x00080008u;
            const __half2 whole = __hfma2(level, both_halves(1.f / kRankStep), both_halves(kRound));
            level = __hfma2(__hsub2(whole, both_halves(kRound)), both_halves(-kRankStep), level);
            const uint32_t sign = bits_of(u) >> 12;
            return {magnitude, level, (sign & kSignPlace) | (bits_of(whole) & ~kSignPlace)};
        } else {
            // 128 +- (level + offset), whose highest bits are the code, under a leading 2^10: the low byte.
            constexpr float kLead = 1024.f + 128.f;
            constexpr uint32_t kOne = 0x3c003c00u;
            const __half2 sign = half2_of((bits_of(u) & kSigns) | kOne);
            return {magnitude, level,
                    bits_of(__hfma2(__hadd2(level, both_halves(kCodeOffset)), sign, both_halves(kLead)))};
        }
    }

    // The codes of two pairs as bytes, as the page stores them (4 bits: sign-magnitude).
    __device__ static __forceinline__ uint32_t codes(uint32_t first, uint32_t second) {
        const uint32_t bytes = __byte_perm(first, second, 0x6420u);
        constexpr uint32_t kMask = 0x01010101u * (Book::count - 1);
        return kBits == 4 ? bytes & kMask : bytes >> (8 - kBits) & kMask;
    }

private:
    static constexpr float kRankStep = 256.f;
    static constexpr float kStepScale = 4096.f;  // 2^12

    // `x` in [2^-8, 8) rounded to fp16's eleven bits.
    static constexpr float round_to_fp16(float x) {
        float last = 0x1p-18f;  // value of the last bit
        while (x >= 2048.f * last) last *= 2.f;
        return static_cast<float>(static_cast<int>(x / last + 0.5f)) * last;
    }

    // The positive half of the codebook as a staircase. 4 bits: each step also adds kRankStep, which carries the rank
    // of the level along.
    struct Steps {
        float first_level;
        float minus_boundary[kHalf];  // times kStepScale
        float rise[kHalf];
    };
    static constexpr Steps steps() {
        Steps result{Book::levels[kHalf] * kLevelScale, {}, {}};
        for (int i = 0; i < kHalf - 1; ++i) {
            result.minus_boundary[i] = -round_to_fp16(Book::boundaries[kHalf + i]) * kStepScale;
            result.rise[i] = (Book::levels[kHalf + i + 1] - Book::levels[kHalf + i]) * kLevelScale +
                             (kBits == 4 ? kRankStep : 0.f);
        }
        return result;
    }

    // The least offset such that the highest bits of 128 +- (level + offset) are the code.
    static constexpr int code_offset() {
        for (int offset = 0; offset < 64; ++offset) {
            bool fits = true;
            for (int rank = 0; rank < kHalf; ++rank) {
                const int magnitude = static_cast<int>(Book::levels[kHalf + rank]) + offset;
                fits = fits && (128 + magnitude) >> (8 - kBits) == kHalf + rank &&
                       (128 - magnitude) >> (8 - kBits) == kHalf - 1 - rank && magnitude < 128;
            }
            if (fits) return offset;
        }
        return -1;
    }
    static constexpr float kCodeOffset = code_offset();
    static_assert(kBits == 4 || code_offset() >= 0, "this codebook's levels do not tell its codes apart");
};

// <|u|, level> of each row, summed over blocks on the tensor cores: of the products of all rows' magnitudes with all
// rows' levels only the diagonal is wanted, and it costs two instructions a block.
struct RowDots {
    float low[4] = {}, high[4] = {};  // rows 0-7 x rows 0-7, rows 8-15 x rows 8-15

    // Pairs of a block: [n tile][row g or g + 8].
    __device__ __forceinline__ void add(const QuantizedPair (&q)[2][2]) {
        const uint32_t a[4] = {bits_of(q[0][0].magnitude), bits_of(q[0][1].magnitude), bits_of(q[1][0].magnitude),
                               bits_of(q[1][1].magnitude)};
        mma_16bit<__half>(low, a, bits_of(q[0][0].level), bits_of(q[1][0].level));
        mma_16bit<__half>(high, a, bits_of(q[0][1].level), bits_of(q[1][1].level));
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
