// Matrix instructions of a warpgroup, four warps, whose B operand stays in shared memory. sm_90a alone has them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "wgmma.cuh"

namespace mq {

constexpr int kWarpgroup = 4;  // warps

// 64 columns of sums of a warp's 16 rows: C fragments of mma.m16n8k16, eight columns each.
using WgmmaSums = float[8][4];

// clang-format off
#define MQ_WGMMA_SUMS(d)                                          \
    "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]),   \
    "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),   \
    "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),   \
    "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]),   \
    "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]),   \
    "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),   \
    "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),   \
    "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])
#define MQ_WGMMA_64(type)                                                                             \
    asm volatile("{.reg .pred on_top; setp.ne.b32 on_top, %38, 0; .reg .b64 b; mov.b64 b, {%36,%37};" \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {"                     \
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                             \
                 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},"                  \
                 "{%32,%33,%34,%35}, b, on_top, 1, 1, 0;}"                                            \
                 : MQ_WGMMA_SUMS(d)                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.place), "r"(b.stride),           \
                   "r"(static_cast<int>(on_top)))
// clang-format on

// C = A B or C += A B, m64n64k16. The warp's `a` is an A fragment of mma.m16n8k16. In between wgmma_begin and
// wgmma_end, which all four warps reach together; until the end nothing else may touch `d`.
template <class Element>
__device__ __forceinline__ void wgmma_64(WgmmaSums& d, bool on_top, const uint32_t (&a)[4], WgmmaOperand b) {
#if MQ_WGMMA
    if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
        MQ_WGMMA_64("bf16");
    } else {
        static_assert(std::is_same_v<Element, __half>);
        MQ_WGMMA_64("f16");
    }
#endif
}

__device__ __forceinline__ void wgmma_begin() {
#if MQ_WGMMA
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_end(WgmmaSums& d) {
#if MQ_WGMMA
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" : MQ_WGMMA_SUMS(d)::"memory");
#endif
}

#undef MQ_WGMMA_64
#undef MQ_WGMMA_SUMS

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
