// Matrix instructions of a warpgroup: four warps multiply together, B stays in shared memory. sm_90a alone has them.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#ifndef MQ_WGMMA  // 0 forces what serves other architectures
#define MQ_WGMMA (MQ_SM == 90)
#endif

namespace mq {

// B in shared memory: core matrices of 8 columns x 8 k, 128 bytes each, a column's k contiguous (PTX ISA, "matrix
// descriptor", not swizzled). In two words: in one, the compiler carries from the low word to the high one.
struct WgmmaOperand {
    uint32_t place, stride;

    // `next_k`, `next_columns`: bytes from a core matrix to the next in k, and to that of the next columns. All three
    // are multiples of 16.
    __device__ __forceinline__ WgmmaOperand(uint32_t shared, uint32_t next_k, uint32_t next_columns)
        : place(shared / 16 | next_k / 16 << 16), stride(next_columns / 16) {}

    // What lies `bytes` further on.
    __device__ __forceinline__ WgmmaOperand at(uint32_t bytes) const {
        WgmmaOperand there = *this;
        there.place += bytes / 16;
        return there;
    }
};

// What this thread has written to shared memory is there for wgmma; a barrier must follow.
__device__ __forceinline__ void wgmma_publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// clang-format off
#define MQ_WGMMA_TILE(c) "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
#define MQ_WGMMA_AB \
    "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.place), "r"(b.stride), "r"(static_cast<int>(accumulate))
// clang-format on

// C (+)= A B, m64n16k16 and m64n32k16, fp16 with fp32 sums: a warp's A and C are those of its 16 rows, the fragments of
// mma.m16n8k16. Between wgmma_begin and wgmma_end.
__device__ __forceinline__ void wgmma_fp16(float (&c)[2][4], const uint32_t (&a)[4], WgmmaOperand b, bool accumulate) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %14, 0; .reg .b64 b; mov.b64 b, {%12,%13};"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, b, p, 1, 1, 0;}"
        : MQ_WGMMA_TILE(c[0]), MQ_WGMMA_TILE(c[1])
        : MQ_WGMMA_AB);
}

__device__ __forceinline__ void wgmma_fp16(float (&c)[4][4], const uint32_t (&a)[4], WgmmaOperand b, bool accumulate) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %22, 0; .reg .b64 b; mov.b64 b, {%20,%21};"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, b, p, 1, 1, 0;}"
        : MQ_WGMMA_TILE(c[0]), MQ_WGMMA_TILE(c[1]), MQ_WGMMA_TILE(c[2]), MQ_WGMMA_TILE(c[3])
        : MQ_WGMMA_AB);
}

#undef MQ_WGMMA_AB
#undef MQ_WGMMA_TILE

// Keeps what the compiler does with sums on its side of this line: it does not know when they change.
template <int kSeries, int kTiles>
__device__ __forceinline__ void pin_sums(float (&sums)[kSeries][kTiles][4]) {
#pragma unroll
    for (int i = 0; i < kSeries * kTiles * 4; ++i)
        asm volatile("" : "+f"(sums[i / (kTiles * 4)][i / 4 % kTiles][i % 4]));
}

// Around products into `sums`; all four warps. Nothing else may touch the sums, or A, in between.
template <int kSeries, int kTiles>
__device__ __forceinline__ void wgmma_begin(float (&sums)[kSeries][kTiles][4]) {
    pin_sums(sums);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

template <int kSeries, int kTiles>
__device__ __forceinline__ void wgmma_end(float (&sums)[kSeries][kTiles][4]) {
    asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" ::: "memory");
    pin_sums(sums);
}

}  // namespace mq
