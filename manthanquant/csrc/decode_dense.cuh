// Rows of queries or outputs times a dense matrix a KV head: what a calibrated dense transform needs before and after
// the attention kernel. Small (a few hundred rows), so plain fp32 arithmetic out of L2 does.
#pragma once

#include "decode_query.cuh"

namespace mq {

constexpr int kDenseGroups = 8;  // of threads: each takes an eighth of the sum, so that few loads follow one another

// Rows a CTA: each matrix element read is used so often. Bounded by the partial sums in shared memory.
template <int kHeadSize>
constexpr int kDenseRows = kHeadSize > 128 ? 4 : 8;

// Grid (KV heads, ceil(tokens * group / kDenseRows)); a thread takes four output channels and an eighth of the sum.
template <int kHeadSize>
__global__ void __launch_bounds__(kDenseGroups * kHeadSize / 4) dense_kernel(const __grid_constant__ DenseParams params) {
    constexpr int kRows = kDenseRows<kHeadSize>, kQuads = kHeadSize / 4, kThreads = kDenseGroups * kQuads;
    constexpr int kDepth = kHeadSize / kDenseGroups, kAtOnce = kDepth < 16 ? kDepth : 16;
    static_assert(kDepth % kAtOnce == 0);
    __shared__ alignas(16) float rows[kHeadSize][kRows];
    __shared__ float4 partial[kDenseGroups][kRows][kQuads];
    allow_next_kernel();
    const int quad = threadIdx.x % kQuads, group = threadIdx.x / kQuads, kv_head = blockIdx.x;
    const int first = blockIdx.y * kRows, total = params.tokens * params.group;
    const float* matrix =
        params.matrix + kv_head * params.matrix_head_stride + group * kDepth * kHeadSize + 4 * quad;
    float4 factor[kAtOnce];
    const auto load = [&](int from) {
#pragma unroll
        for (int d = 0; d < kAtOnce; ++d)
            factor[d] = __ldg(reinterpret_cast<const float4*>(matrix + (from + d) * kHeadSize));
    };
    load(0);  // the model's constant: it may come while the kernel before still runs
    await_previous_kernel();
    for (int i = threadIdx.x; i < kRows * kHeadSize; i += kThreads) {
        const int row = first + i / kHeadSize, channel = i % kHeadSize, token = row / params.group;
        const int head = kv_head * params.group + row - token * params.group;
        const int64_t at = token * params.in_token_stride + head * params.in_head_stride + channel;
        rows[channel][i / kHeadSize] =
            row < total ? to_float(load_raw(params.in, at, params.in_dtype), params.in_dtype) : 0.0f;
    }
    __syncthreads();

    float4 sum[kRows] = {};
#pragma unroll
    for (int from = 0; from < kDepth; from += kAtOnce) {
        if (from > 0) load(from);
#pragma unroll
        for (int d = 0; d < kAtOnce; ++d) {
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                const float x = rows[group * kDepth + from + d][i];
                sum[i].x = fmaf(x, factor[d].x, sum[i].x), sum[i].y = fmaf(x, factor[d].y, sum[i].y);
                sum[i].z = fmaf(x, factor[d].z, sum[i].z), sum[i].w = fmaf(x, factor[d].w, sum[i].w);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) partial[group][i][quad] = sum[i];
    __syncthreads();

    for (int i = threadIdx.x; i < kRows * kHeadSize; i += kThreads) {
        const int row = first + i / kHeadSize, channel = i % kHeadSize, token = row / params.group;
        if (row >= total) continue;
        const int head = kv_head * params.group + row - token * params.group;
        float value = 0.0f;
        if (params.addend != nullptr)
            value = params.addend[(static_cast<int64_t>(token) * params.kv_heads * params.group + head) * kHeadSize + channel];
#pragma unroll
        for (int part = 0; part < kDenseGroups; ++part)
            value += reinterpret_cast<const float*>(partial[part][i / kHeadSize])[channel];
        const int64_t at = token * params.out_token_stride + head * params.out_head_stride + channel;
        store_element(params.out, at, params.out_dtype, value);
    }
}

}  // namespace mq
