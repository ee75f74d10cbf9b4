// The Hadamard rotation as B fragments of mma.m16n8k16, which need no memory: every element is +-1.
//
// H is block diagonal in each class of channels, with Sylvester-Hadamard blocks: H[m][k] = (-1)^popcount(m & k),
// counted within a block. It is symmetric, and without its norm its own inverse. In units of 16 channels it is one
// 16 x 16 fragment and its negative.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "layout.h"

namespace mq {

// A pair of 16-bit numbers, negated.
constexpr uint32_t kSignBits = 0x80008000u;

// {H[in][out], H[in + 1][out]} of channels of one block of 16, as a pair of `Element`.
template <class Element>
__device__ __forceinline__ uint32_t rotation_pair(int in, int out) {
    constexpr uint32_t kOnes = std::is_same_v<Element, __half> ? 0x3c003c00u : 0x3f803f80u;
    return kOnes | (__popc(in & out) & 1) << 15 | static_cast<uint32_t>(__popc((in + 1) & out) & 1) << 31;
}

// Which blocks of 16 channels of a side one Hadamard matrix mixes, and with which sign.
template <class Side>
struct Rotation {
    // Blocks of 16 channels of one Hadamard matrix: the largest power of two that divides the class.
    MQ_HOST_DEVICE static constexpr int order_blocks(int cls) {
        return (Side::channels(cls) & -Side::channels(cls)) / 16;
    }
    MQ_HOST_DEVICE static constexpr int class_of(int block) { return 16 * block < Side::channels(0) ? 0 : 1; }

    // The first block of the matrix that mixes a block.
    MQ_HOST_DEVICE static constexpr int first_of_matrix(int block) {
        return block - place(block) % order_blocks(class_of(block));
    }

    MQ_HOST_DEVICE static constexpr bool mixes(int in, int out) {
        const int cls = class_of(in);
        return cls == class_of(out) && place(in) / order_blocks(cls) == place(out) / order_blocks(cls);
    }
    MQ_HOST_DEVICE static constexpr bool negates(int in, int out) {
        int both = place(in) & place(out) & (order_blocks(class_of(in)) - 1), odd = 0;
        for (; both; both &= both - 1) odd ^= 1;
        return odd;
    }
    // Whether a block and the one `distance` (a power of two) after it are a butterfly of the matrix that mixes them.
    MQ_HOST_DEVICE static constexpr bool pairs(int block, int distance) {
        const int cls = class_of(block);
        return distance < order_blocks(cls) && (place(block) & distance) == 0;
    }

private:
    MQ_HOST_DEVICE static constexpr int place(int block) {
        return block - Side::first_channel(class_of(block)) / 16;
    }
};

}  // namespace mq
