// Matrix instructions of a warpgroup, four warps, whose B operand stays in shared memory. sm_90a alone has them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#ifndef MQ_WGMMA  // 0 forces what serves other architectures
#define MQ_WGMMA (MQ_SM == 90)
#endif

namespace mq {

constexpr int kWarpgroup = 4;  // warps

// Sums of a warp's 16 rows: C fragments of mma.m16n8k16, eight columns each.
template <int kTiles>
using WgmmaSums = float[kTiles][4];

// B operand in shared memory: core matrices of 8 columns x 8 elements of k, a column's elements contiguous, 128 bytes
// each. Two words of one number: as one, the compiler carries from the low word to the high one.
struct WgmmaOperand {
    uint32_t place, stride;

    // `next_k`, `next_columns`: bytes from a core matrix to the next along k, to the next along columns.
    __device__ __forceinline__ WgmmaOperand(uint32_t shared, uint32_t next_k, uint32_t next_columns)
        : place(shared / 16 | next_k / 16 << 16), stride(next_columns / 16) {}

    // The same `bytes` further.
    __device__ __forceinline__ WgmmaOperand at(uint32_t bytes) const {
        WgmmaOperand there = *this;
        there.place += bytes / 16;
        return there;
    }
};

// clang-format off
#define MQ_TILE(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define MQ_TILES_2(d) MQ_TILE(d, 0), MQ_TILE(d, 1)
#define MQ_TILES_4(d) MQ_TILES_2(d), MQ_TILE(d, 2), MQ_TILE(d, 3)
#define MQ_TILES_8(d) MQ_TILES_4(d), MQ_TILE(d, 4), MQ_TILE(d, 5), MQ_TILE(d, 6), MQ_TILE(d, 7)
#define MQ_NUMBERS_2 "%0,%1,%2,%3,%4,%5,%6,%7"
#define MQ_NUMBERS_4 MQ_NUMBERS_2 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define MQ_NUMBERS_8 MQ_NUMBERS_4 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
// `tiles`: of eight columns each. Behind their numbers come those of A, B and on_top.
#define MQ_WGMMA_FOR(tiles, columns, type, a_numbers, b_numbers, on_top_number)                     \
    asm volatile("{.reg .pred on_top; setp.ne.b32 on_top, " on_top_number ", 0;"                    \
                 ".reg .b64 b; mov.b64 b, {" b_numbers "};"                                         \
                 "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type               \
                 " {" MQ_NUMBERS_##tiles "}, {" a_numbers "}, b, on_top, 1, 1, 0;}"                 \
                 : MQ_TILES_##tiles(d)                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.place), "r"(b.stride),         \
                   "r"(static_cast<int>(on_top)))
#define MQ_WGMMA_OF(type)                                                                           \
    if constexpr (kTiles == 2)                                                                      \
        MQ_WGMMA_FOR(2, "16", type, "%8,%9,%10,%11", "%12,%13", "%14");                             \
    else if constexpr (kTiles == 4)                                                                 \
        MQ_WGMMA_FOR(4, "32", type, "%16,%17,%18,%19", "%20,%21", "%22");                           \
    else                                                                                            \
        MQ_WGMMA_FOR(8, "64", type, "%32,%33,%34,%35", "%36,%37", "%38")
// clang-format on

// C = A B or C += A B, m64n16k16 to m64n64k16. The warp's `a` is an A fragment of mma.m16n8k16. In between wgmma_begin
// and wgmma_end, which all four warps reach together; until the end nothing else may touch `d`.
template <class Element, int kTiles>
__device__ __forceinline__ void wgmma(WgmmaSums<kTiles>& d, bool on_top, const uint32_t (&a)[4], WgmmaOperand b) {
    static_assert(kTiles == 2 || kTiles == 4 || kTiles == 8);
#if MQ_WGMMA
    if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
        MQ_WGMMA_OF("bf16");
    } else {
        static_assert(std::is_same_v<Element, __half>);
        MQ_WGMMA_OF("f16");
    }
#endif
}

// Keeps what the compiler does with sums on its side of this line; it does not know when they change.
template <int kTiles>
__device__ __forceinline__ void pin_sums(WgmmaSums<kTiles>& d) {
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) asm volatile("" : "+f"(d[i / 4][i % 4]));
}

template <int kSeries, int kTiles>
__device__ __forceinline__ void pin_sums(float (&d)[kSeries][kTiles][4]) {
#pragma unroll
    for (int i = 0; i < kSeries; ++i) pin_sums(d[i]);
}

template <class... Sums>
__device__ __forceinline__ void wgmma_begin(Sums&... d) {
#if MQ_WGMMA
    (pin_sums(d), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

template <class... Sums>
__device__ __forceinline__ void wgmma_end(Sums&... d) {
#if MQ_WGMMA
    asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" ::: "memory");
    (pin_sums(d), ...);
#endif
}

#undef MQ_WGMMA_OF
#undef MQ_WGMMA_FOR
#undef MQ_NUMBERS_8
#undef MQ_NUMBERS_4
#undef MQ_NUMBERS_2
#undef MQ_TILES_8
#undef MQ_TILES_4
#undef MQ_TILES_2
#undef MQ_TILE

// What this thread has written to shared memory is there for wgmma; a barrier must follow.
__device__ __forceinline__ void wgmma_publish() {
#if MQ_WGMMA
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Whether any of the warpgroup's threads says so. `kBarrier`: 1 to 15, one a warpgroup.
template <int kBarrier>
__device__ __forceinline__ bool warpgroup_any(bool mine) {
    int any;
    asm volatile(
        "{.reg .pred mine, any; setp.ne.b32 mine, %1, 0; barrier.cta.red.or.pred any, %2, %3, mine; selp.b32 %0, 1, 0, "
        "any;}"
        : "=r"(any)
        : "r"(static_cast<int>(mine)), "n"(kBarrier), "n"(kWarpgroup * 32)
        : "memory");
    return any != 0;
}

}  // namespace mq
