// The exact tier: attention of one warp over bf16 units, in the model's own space.
//
// There are few of them: the newest tokens and the sinks. Channels may lie in any order along a matrix instruction's
// inner dimension, so a lane's 16 bytes are used as they come.
#pragma once

#include "decode_query.cuh"

namespace mq {

// Two bf16 that together hold a float to 16 bits, packed for one row of a transpose.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float bf16_residual(float x) { return x - __bfloat162float(__float2bfloat16(x)); }

// A lane's share of the rows g and g + 8 of a unit [16][kHeadSize]: pieces of 8 channels, 32 j + 8 c onwards, as four
// registers; where 16 channels are left, one piece of 4, in two.
template <int kHeadSize>
struct ExactRows {
    static constexpr int kPieces = kHeadSize / 32;
    static constexpr bool kTail = kHeadSize % 32 != 0;
    static constexpr int kRegisters = kHeadSize / 8;
    static_assert(kHeadSize % 16 == 0);

    uint32_t row[2][kRegisters];

    // `unit`: [16][kHeadSize] in shared memory.
    __device__ __forceinline__ void load(const uint8_t* unit, int lane) {
        const int g = lane / 4, c = lane % 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint8_t* from = unit + (g + 8 * half) * kHeadSize * 2;
#pragma unroll
            for (int j = 0; j < kPieces; ++j) {
                const uint4 piece = *reinterpret_cast<const uint4*>(from + 64 * j + 16 * c);
                row[half][4 * j] = piece.x, row[half][4 * j + 1] = piece.y;
                row[half][4 * j + 2] = piece.z, row[half][4 * j + 3] = piece.w;
            }
            if constexpr (kTail) {
                const uint2 piece = *reinterpret_cast<const uint2*>(from + 64 * kPieces + 8 * c);
                row[half][4 * kPieces] = piece.x, row[half][4 * kPieces + 1] = piece.y;
            }
        }
    }

    // Register r of row g, transposed, holds this channel in the lanes of group g.
    __device__ static __forceinline__ int channel(int reg, int g) {
        const int piece = reg / 4, channels_a_lane = piece < kPieces ? 8 : 4;
        return 32 * piece + channels_a_lane * (g / 2) + 2 * (reg % 4) + g % 2;
    }
};

// Scores of one unit: `scores[half][h]` of token g + 8 half and row kRowsPerLane * c + h, not scaled.
template <int kRows, int kHeadSize>
__device__ __forceinline__ void score_exact_unit(const ExactRows<kHeadSize>& keys,
                                                 const SplitRows<kRows, kHeadSize>& query, int lane,
                                                 float (&scores)[2][kRows / 4]) {
    const int g = lane / 4, c = lane % 4;
    float sum[column_tiles<kRows>()][4] = {};
#pragma unroll
    for (int plane = 0; plane < kRows / 4; ++plane) {
        const __nv_bfloat16* column = query.column(plane, g);
#pragma unroll
        for (int reg = 0; reg < ExactRows<kHeadSize>::kRegisters; reg += 2) {
            const bool tail = reg / 4 >= ExactRows<kHeadSize>::kPieces;
            const int channel = 32 * (reg / 4) + (tail ? 4 : 8) * c + 2 * (reg % 4);
            const uint2 q = *reinterpret_cast<const uint2*>(column + channel);
            mma_bf16(sum[plane / 2], keys.row[0][reg], keys.row[1][reg], keys.row[0][reg + 1], keys.row[1][reg + 1],
                     q.x, q.y);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if constexpr (kRows == 4) {
            scores[half][0] = sum[0][2 * half] + sum[0][2 * half + 1];
        } else {
#pragma unroll
            for (int h = 0; h < kRows / 4; ++h) scores[half][h] = sum[h / 2][2 * half + h % 2];
        }
    }
}

// Adds probabilities * values of one unit. `sums[columns][reg / 2]`: registers reg (rows 0 to 7 of C) and reg + 1.
template <int kRows, int kHeadSize>
__device__ __forceinline__ void accumulate_exact_unit(const ExactRows<kHeadSize>& values,
                                                      const float (&probabilities)[2][kRows / 4],
                                                      float (&sums)[column_tiles<kRows>()][kHeadSize / 16][4]) {
    constexpr int kPlanes = kRows / 4;
    uint32_t b[kPlanes][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float(&p)[kRows / 4] = probabilities[half];
        if constexpr (kPlanes == 1) {
            b[0][half] = transpose_8x8(pack_bf16(p[0], bf16_residual(p[0])));
        } else {
#pragma unroll
            for (int h = 0; h < kPlanes; h += 2) {
                b[h][half] = transpose_8x8(pack_bf16(p[h], p[h + 1]));
                b[h + 1][half] = transpose_8x8(pack_bf16(bf16_residual(p[h]), bf16_residual(p[h + 1])));
            }
        }
    }
#pragma unroll
    for (int reg = 0; reg < ExactRows<kHeadSize>::kRegisters; reg += 2) {
        uint32_t a[2][2];  // [half][register]: channels as rows, two tokens a register
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            a[half][0] = transpose_8x8(values.row[half][reg]);
            a[half][1] = transpose_8x8(values.row[half][reg + 1]);
        }
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane)
            mma_bf16(sums[plane / 2][reg / 2], a[0][0], a[0][1], a[1][0], a[1][1], b[plane][0], b[plane][1]);
    }
}

}  // namespace mq
