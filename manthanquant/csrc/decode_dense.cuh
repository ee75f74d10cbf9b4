// Rows of queries or outputs times a dense matrix a KV head: what a calibrated dense transform needs before and after
// the attention kernel.
//
// Bound by latency: rows are few and the matrices (64 KB a KV head at D = 128) lie in L2. So the matrix, a constant of
// the model, is on its way before the kernel in front ends, and bf16 matrix instructions do the rest. A factor is a sum
// of two bf16, high and low; high * high + high * low + low * high keeps 16 bits of it.
#pragma once

#include "decode_exact.cuh"
#include "decode_query.cuh"

namespace mq {

constexpr int kDenseWarps = 4;       // a CTA; each a tile of eight output channels
constexpr int kDenseRows = 16;       // of a matrix instruction
constexpr int kMostDenseCtas = 512;  // more do not run at once: then a warp works on several tiles of rows

// Four neighbouring channels: as they lie in memory (the first two words, where elements have 16 bits), and what they
// mean. Apart, and without a branch on the dtype at each load, so that all loads are on their way together.
__device__ __forceinline__ float4 four_channels(const uint4& raw, Dtype dtype) {
    if (dtype == Dtype::kFp32)
        return {__uint_as_float(raw.x), __uint_as_float(raw.y), __uint_as_float(raw.z), __uint_as_float(raw.w)};
    return {to_float(raw.x & 0xffffu, dtype), to_float(raw.x >> 16, dtype), to_float(raw.y & 0xffffu, dtype),
            to_float(raw.y >> 16, dtype)};
}

// Rows' channels first + 16 i, i < kCount, four each.
template <int kCount>
__device__ __forceinline__ void load_channels(const void* base, int64_t first, Dtype dtype, bool valid,
                                              uint4 (&raw)[kCount]) {
#pragma unroll
    for (uint4& four : raw) four = {};
    if (!valid) return;
    if (dtype == Dtype::kFp32) {
        const float* from = static_cast<const float*>(base) + first;
#pragma unroll
        for (int i = 0; i < kCount; ++i) raw[i] = *reinterpret_cast<const uint4*>(from + 16 * i);
    } else {
        const uint16_t* from = static_cast<const uint16_t*>(base) + first;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const uint2 two = *reinterpret_cast<const uint2*>(from + 16 * i);
            raw[i].x = two.x, raw[i].y = two.y;
        }
    }
}

// Grid (KV heads, tiles of rows or fewer, ceil(tiles of channels / kDenseWarps)). In a k step of 16 channels lane
// 4 g + c has channels 4 c to 4 c + 3; `params.matrix` is dealt alike: [KV head][channel tile][k step][lane]{high 0,
// high 1, low 0, low 1}, two bf16 each.
template <int kHeadSize>
__global__ void __launch_bounds__(kDenseWarps * kLanes) dense_kernel(const __grid_constant__ DenseParams params) {
    constexpr int kSteps = kHeadSize / 16, kTiles = kHeadSize / 8;
    constexpr int kAtOnce = kSteps > 8 ? 4 : kSteps;  // k steps of rows in registers
    allow_next_kernel();
    const int lane = threadIdx.x % kLanes, g = lane / 4, c = lane % 4, kv_head = blockIdx.x;
    const int tile = blockIdx.z * kDenseWarps + threadIdx.x / kLanes, total = params.tokens * params.group;
    if (tile >= kTiles) return;
    const uint4* matrix = reinterpret_cast<const uint4*>(params.matrix + kv_head * params.matrix_head_stride) + lane;
    uint4 factor[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) factor[step] = __ldg(matrix + (tile * kSteps + step) * kLanes);
    await_previous_kernel();

    for (int first_row = blockIdx.y * kDenseRows; first_row < total; first_row += gridDim.y * kDenseRows) {
        int token[2], head[2];  // of rows g and g + 8
        int64_t first[2];
        bool valid[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + 8 * half + g;
            valid[half] = row < total;
            token[half] = row / params.group, head[half] = kv_head * params.group + row - token[half] * params.group;
            first[half] = token[half] * params.in_token_stride + head[half] * params.in_head_stride + 4 * c;
        }
        float sum[3][4] = {};  // high * high, high * low, low * high
#pragma unroll
        for (int from = 0; from < kSteps; from += kAtOnce) {
            uint4 raw[2][kAtOnce];
#pragma unroll
            for (int half = 0; half < 2; ++half)
                load_channels(params.in, first[half] + 16 * from, params.in_dtype, valid[half], raw[half]);
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                uint32_t high[2][2], low[2][2];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float4 v = four_channels(raw[half][i], params.in_dtype);
                    high[half][0] = pack_bf16(v.x, v.y), high[half][1] = pack_bf16(v.z, v.w);
                    low[half][0] = pack_bf16(bf16_residual(v.x), bf16_residual(v.y));
                    low[half][1] = pack_bf16(bf16_residual(v.z), bf16_residual(v.w));
                }
                const uint4 b = factor[from + i];
                mma_bf16(sum[0], high[0][0], high[1][0], high[0][1], high[1][1], b.x, b.y);
                mma_bf16(sum[1], high[0][0], high[1][0], high[0][1], high[1][1], b.z, b.w);
                mma_bf16(sum[2], low[0][0], low[1][0], low[0][1], low[1][1], b.x, b.y);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (!valid[half]) continue;
            const int channel = 8 * tile + 2 * c;
            float2 value;
            value.x = sum[0][2 * half] + (sum[1][2 * half] + sum[2][2 * half]);
            value.y = sum[0][2 * half + 1] + (sum[1][2 * half + 1] + sum[2][2 * half + 1]);
            if (params.addend != nullptr) {
                const int64_t row = static_cast<int64_t>(token[half]) * params.kv_heads * params.group + head[half];
                const float2 addend = *reinterpret_cast<const float2*>(params.addend + row * kHeadSize + channel);
                value.x += addend.x, value.y += addend.y;
            }
            const int64_t at = token[half] * params.out_token_stride + head[half] * params.out_head_stride + channel;
            store_element(params.out, at, params.out_dtype, value.x);
            store_element(params.out, at + 1, params.out_dtype, value.y);
        }
    }
}

}  // namespace mq
