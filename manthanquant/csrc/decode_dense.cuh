// Rows of queries or outputs times a dense matrix a KV head: what a calibrated dense transform needs before and after
// the attention kernel. Small (a few hundred rows), so plain fp32 arithmetic out of L2 does.
#pragma once

#include "decode_query.cuh"

namespace mq {

constexpr int kDenseRows = 8;  // rows a CTA: each matrix element read is used so often

// Grid (KV heads, ceil(tokens * group / kDenseRows)), a thread an output channel.
template <int kHeadSize>
__global__ void __launch_bounds__(kHeadSize) dense_kernel(const __grid_constant__ DenseParams params) {
    __shared__ float rows[kHeadSize][kDenseRows];
    allow_next_kernel();
    await_previous_kernel();
    const int channel = threadIdx.x, kv_head = blockIdx.x, total = params.tokens * params.group;
    const int first = blockIdx.y * kDenseRows;
#pragma unroll
    for (int i = 0; i < kDenseRows; ++i) {
        const int row = first + i, token = row / params.group, head = kv_head * params.group + row % params.group;
        const int64_t at = token * params.in_token_stride + head * params.in_head_stride + channel;
        rows[channel][i] = row < total ? to_float(load_raw(params.in, at, params.in_dtype), params.in_dtype) : 0.0f;
    }
    __syncthreads();

    const float* column = params.matrix + kv_head * params.matrix_head_stride + channel;
    float sum[kDenseRows] = {};
#pragma unroll 16
    for (int d = 0; d < kHeadSize; ++d) {
        const float factor = __ldg(column + d * kHeadSize);
#pragma unroll
        for (int i = 0; i < kDenseRows; ++i) sum[i] = fmaf(rows[d][i], factor, sum[i]);
    }

#pragma unroll
    for (int i = 0; i < kDenseRows; ++i) {
        const int row = first + i;
        if (row >= total) continue;
        const int token = row / params.group, head = kv_head * params.group + row % params.group;
        if (params.addend != nullptr)
            sum[i] += params.addend[(static_cast<int64_t>(token) * params.kv_heads * params.group + head) * kHeadSize + channel];
        const int64_t at = token * params.out_token_stride + head * params.out_head_stride + channel;
        store_element(params.out, at, params.out_dtype, sum[i]);
    }
}

}  // namespace mq
