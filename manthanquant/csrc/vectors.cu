// The seed format's codec: [N, D] vectors to a radius and 3-bit codes, and back, one launch each, bit for bit what
// manthanquant.vectors computes in PyTorch.
//
// A lane takes 16 consecutive elements: 48 bits of the code stream, so two lanes make three whole words. 4, 8 or 16
// lanes make a vector of up to 64, 128 or 256 elements; longer ones are walked in blocks of 256. Squares are summed in
// the reference's order, neighbours first, which is a lane's own elements, then a butterfly over lanes. No operation
// is contracted to FMA where the reference rounds twice.
//
// The code of u = x * factor is the number of boundaries below u. A comparison is one saturating FMA,
// saturate((u - boundary) * 2^50), exactly 0 or 1 as two different fp32 numbers near a boundary (none but zero is
// below 0.25) are at least 2^-26 apart; eight codes add up in one fp32 as 24 exact bits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "seed_codebook.h"
#include "vectors.h"

namespace mq {
namespace {

constexpr int kPerLane = 16;
constexpr int kBits = 3;
constexpr int kCodes = 1 << kBits;
constexpr int kThreads = 256;
constexpr int kMostLanes = 16;
constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(float x) { return x; }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ __half from_float(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ float from_float(float x) { return x; }

// 16 bytes of elements.
template <class T>
union Packet {
    static constexpr int count = 16 / sizeof(T);
    uint4 raw;
    T element[count];
};

// Elements [first, first + 16) of a row as fp32; zero past the row's end.
template <class T>
__device__ __forceinline__ void load_elements(float (&x)[kPerLane], const T* row, int first, int size, bool wide) {
    if (wide && first + kPerLane <= size) {
#pragma unroll
        for (int i = 0; i < kPerLane; i += Packet<T>::count) {
            Packet<T> packet;
            packet.raw = __ldg(reinterpret_cast<const uint4*>(row + first + i));
#pragma unroll
            for (int e = 0; e < Packet<T>::count; ++e) x[i + e] = to_float(packet.element[e]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) x[i] = first + i < size ? to_float(row[first + i]) : 0.f;
    }
}

template <class T>
__device__ __forceinline__ void store_elements(const float (&x)[kPerLane], T* row, int first, int size, bool wide) {
    if (wide && first + kPerLane <= size) {
#pragma unroll
        for (int i = 0; i < kPerLane; i += Packet<T>::count) {
            Packet<T> packet;
#pragma unroll
            for (int e = 0; e < Packet<T>::count; ++e) packet.element[e] = from_float<T>(x[i + e]);
            *reinterpret_cast<uint4*>(row + first + i) = packet.raw;
        }
    } else {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i)
            if (first + i < size) row[first + i] = from_float<T>(x[i]);
    }
}

// The sum of squares of a block of 16 kLanes elements, neighbours first, in every lane of the vector.
template <int kLanes>
__device__ __forceinline__ float block_square(const float (&x)[kPerLane]) {
    float sums[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sums[i] = __fmul_rn(x[i], x[i]);
#pragma unroll
    for (int width = kPerLane / 2; width > 0; width /= 2) {
#pragma unroll
        for (int i = 0; i < width; ++i) sums[i] = __fadd_rn(sums[2 * i], sums[2 * i + 1]);
    }
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2)
        sums[0] = __fadd_rn(sums[0], __shfl_xor_sync(kFullWarp, sums[0], step));
    return sums[0];
}

// Codes of eight elements, 24 bits.
__device__ __forceinline__ uint32_t eight_codes(const float* x, float factor) {
    constexpr float kStepScale = 1125899906842624.f;  // 2^50
    constexpr SeedCodebook kBook{};
    float bits = 0.f, weight = 1.f;
#pragma unroll
    for (int i = 0; i < 8; ++i, weight *= kCodes) {
        const float u = __fmul_rn(x[i], factor);
#pragma unroll
        for (int b = 0; b < kCodes - 1; ++b) {
            const bool middle = b == kCodes / 2 - 1;  // zero has neighbours closer than any 2^-26
            const float above = middle ? (u > 0.f ? 1.f : 0.f)
                                       : __saturatef(fmaf(u, kStepScale, -kBook.boundaries[b] * kStepScale));
            bits = fmaf(above, weight, bits);
        }
    }
    return static_cast<uint32_t>(__float2int_rz(bits));
}

template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads)
    encode_kernel(VectorParams p, const T* __restrict__ vectors, uint32_t* __restrict__ codes,
                  float* __restrict__ radius, bool wide) {
    constexpr int kBlock = kLanes * kPerLane;
    constexpr float kTiny = 1e-30f;
    const int lane = threadIdx.x % kLanes;
    const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
    const bool present = row < p.count;  // all lanes take part in shuffles
    const T* line = vectors + (present ? row : 0) * p.row_stride;
    float x[kPerLane], square = 0.f;
    for (int first = 0; first < p.size; first += kBlock) {
        load_elements(x, line, first + lane * kPerLane, p.size, wide);
        square = __fadd_rn(square, block_square<kLanes>(x));
    }
    const float length = __fsqrt_rn(square);
    const float factor = __fdiv_rn(p.root, fmaxf(length, kTiny));
    if (present && lane == 0) radius[row] = length;
    for (int first = 0; first < p.size; first += kBlock) {
        const int mine = first + lane * kPerLane;
        if (p.size > kBlock) load_elements(x, line, mine, p.size, wide);
        uint64_t stream = eight_codes(x, factor) | static_cast<uint64_t>(eight_codes(x + 8, factor)) << 24;
        const int valid = p.size - mine;  // codes past the end are zero bits
        if (valid < kPerLane) stream &= valid > 0 ? (1ull << (kBits * valid)) - 1 : 0ull;
        // Of a pair of lanes, the even one writes words 0 and 1, the odd one word 2.
        const uint32_t next = __shfl_down_sync(kFullWarp, static_cast<uint32_t>(stream), 1);
        const int word = mine / 32 * 3;
        uint32_t* out = codes + row * p.code_words + word;
        if (!present) continue;
        if (lane % 2 == 0) {
            if (word < p.code_words) out[0] = static_cast<uint32_t>(stream);
            if (word + 1 < p.code_words) out[1] = static_cast<uint32_t>(stream >> 32) | next << 16;
        } else if (word + 2 < p.code_words) {
            out[2] = static_cast<uint32_t>(stream >> 16);
        }
    }
}

template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads)
    decode_kernel(VectorParams p, const uint32_t* __restrict__ codes, const float* __restrict__ radius,
                  T* __restrict__ vectors, bool wide) {
    constexpr SeedCodebook kBook{};
    const int lane = threadIdx.x % kLanes;
    const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
    const bool present = row < p.count;
    float level = 0.f;  // lane i of eight holds level i, and a shuffle looks it up
#pragma unroll
    for (int code = 0; code < kCodes; ++code) level = threadIdx.x % kCodes == code ? kBook.levels[code] : level;
    const float scale = present ? __fmul_rn(__ldg(radius + row), p.inverse_root) : 0.f;
    const uint32_t* line = codes + (present ? row : 0) * p.code_words;
    for (int first = 0; first < p.size; first += kLanes * kPerLane) {
        const int mine = first + lane * kPerLane;
        const auto word = [&](int offset) {
            const int at = mine / 32 * 3 + offset;
            return at < p.code_words ? __ldg(line + at) : 0u;
        };
        const uint32_t middle = word(1), outer = word(lane % 2 == 0 ? 0 : 2);
        const uint64_t stream = lane % 2 == 0 ? outer | static_cast<uint64_t>(middle) << 32
                                              : middle >> 16 | static_cast<uint64_t>(outer) << 16;
        float x[kPerLane];
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            const int code = static_cast<int>(stream >> (kBits * i)) & (kCodes - 1);
            x[i] = __fmul_rn(__shfl_sync(kFullWarp, level, code, kCodes), scale);
        }
        if (present) store_elements(x, vectors + row * p.row_stride, mine, p.size, wide);
    }
}

template <class T>
bool is_wide(const VectorParams& p, const void* vectors) {
    return reinterpret_cast<uintptr_t>(vectors) % 16 == 0 && p.row_stride * sizeof(T) % 16 == 0;
}

template <class T, int kLanes>
unsigned grid_size(const VectorParams& p) {
    return static_cast<unsigned>((p.count * kLanes + kThreads - 1) / kThreads);
}

// Calls `body` with the element type and the lanes a vector takes.
template <class Body>
cudaError_t dispatch(const VectorParams& p, Body body) {
    if (p.count == 0) return cudaSuccess;
    const auto by_lanes = [&](auto element) {
        if (p.size <= 4 * kPerLane) return body(element, std::integral_constant<int, 4>{});
        if (p.size <= 8 * kPerLane) return body(element, std::integral_constant<int, 8>{});
        return body(element, std::integral_constant<int, kMostLanes>{});
    };
    switch (p.type) {
        case VectorType::bfloat16: by_lanes(__nv_bfloat16{}); break;
        case VectorType::float16: by_lanes(__half{}); break;
        case VectorType::float32: by_lanes(float{}); break;
    }
    return cudaGetLastError();
}

}  // namespace

cudaError_t launch_encode(const VectorParams& p, const void* vectors, uint32_t* codes, float* radius,
                          cudaStream_t stream) {
    return dispatch(p, [&](auto element, auto lanes) {
        using T = decltype(element);
        encode_kernel<T, lanes.value><<<grid_size<T, lanes.value>(p), kThreads, 0, stream>>>(
            p, static_cast<const T*>(vectors), codes, radius, is_wide<T>(p, vectors));
    });
}

cudaError_t launch_decode(const VectorParams& p, const uint32_t* codes, const float* radius, void* vectors,
                          cudaStream_t stream) {
    return dispatch(p, [&](auto element, auto lanes) {
        using T = decltype(element);
        decode_kernel<T, lanes.value><<<grid_size<T, lanes.value>(p), kThreads, 0, stream>>>(
            p, codes, radius, static_cast<T*>(vectors), is_wide<T>(p, vectors));
    });
}

}  // namespace mq
