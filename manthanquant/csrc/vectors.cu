// The seed format's codec: [N, D] vectors to a radius and 3-bit codes, and back, one launch each, bit for bit what
// manthanquant.vectors computes in PyTorch.
//
// To encode, a lane takes 32 consecutive elements, three whole words of the code stream; 2, 4 or 8 lanes make a vector
// of up to 64, 128 or 256 elements, and longer ones are walked in blocks of 256. Squares are summed in the reference's
// order, neighbours first, which is a lane's own elements, then a butterfly over lanes. No operation is contracted to
// FMA where the reference rounds twice. To decode, a lane takes 16 elements, so that stores lie closer together.
//
// The code of u = x * factor, rounded to fp32, is the number of boundaries below u.
//
// 16-bit elements: u grows with x, so each boundary has a least x whose u is above it. The lane finds those seven
// thresholds exactly (`Thresholds`), then compares two elements an instruction and adds up 0s and 1s.
//
// fp32 elements: a comparison is one saturating FMA, saturate((u - boundary) * 2^50), exactly 0 or 1 as two different
// fp32 numbers near a boundary (none but zero is below 0.25) are at least 2^-26 apart; eight codes add up in one fp32
// as 24 exact bits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "seed_codebook.h"
#include "vectors.h"

namespace mq {
namespace {

constexpr int kEncodePerLane = 32, kDecodePerLane = 16;
constexpr int kBits = 3;
constexpr int kCodes = 1 << kBits;
constexpr int kThreads = 128;
constexpr int kMostElements = 256;  // that the lanes of a vector hold at once
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

// A lane's elements as they lie in memory.
template <class T, int kPerLane>
struct Elements {
    static constexpr int kPerPacket = 16 / sizeof(T);
    union {
        uint4 packets[kPerLane / kPerPacket];
        uint32_t words[kPerLane * sizeof(T) / 4];
        T items[kPerLane];
    };

    __device__ __forceinline__ Elements() {}
    __device__ __forceinline__ float operator[](int i) const { return to_float(items[i]); }

    // Elements [first, first + kPerLane) of a row; zero past the row's end.
    __device__ __forceinline__ void load(const T* row, int first, int size, bool wide) {
        if (wide && first + kPerLane <= size) {
#pragma unroll
            for (int i = 0; i < kPerLane / kPerPacket; ++i)
                packets[i] = __ldg(reinterpret_cast<const uint4*>(row + first) + i);
        } else {
#pragma unroll
            for (int i = 0; i < kPerLane; ++i) items[i] = first + i < size ? row[first + i] : from_float<T>(0.f);
        }
    }

    __device__ __forceinline__ void store(T* row, int first, int size, bool wide) const {
        if (wide && first + kPerLane <= size) {
#pragma unroll
            for (int i = 0; i < kPerLane / kPerPacket; ++i) reinterpret_cast<uint4*>(row + first)[i] = packets[i];
        } else {
#pragma unroll
            for (int i = 0; i < kPerLane; ++i)
                if (first + i < size) row[first + i] = items[i];
        }
    }
};

// The sum of squares of elements [first, first + kCount), neighbours first.
template <int kCount, class T, int kPerLane>
__device__ __forceinline__ float square_of(const Elements<T, kPerLane>& x, int first) {
    if constexpr (kCount == 1) return __fmul_rn(x[first], x[first]);
    else return __fadd_rn(square_of<kCount / 2>(x, first), square_of<kCount / 2>(x, first + kCount / 2));
}

// The same over all lanes of a vector, in every one of them.
template <int kLanes, class T, int kPerLane>
__device__ __forceinline__ float block_square(const Elements<T, kPerLane>& x) {
    float sum = square_of<kPerLane>(x, 0);
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, step));
    return sum;
}

// Codes of elements [first, first + 8), 24 bits, one by one.
template <class T>
__device__ __forceinline__ uint32_t eight_codes(const Elements<T, kEncodePerLane>& x, int first, float factor) {
    constexpr float kStepScale = 1125899906842624.f;  // 2^50
    constexpr SeedCodebook kBook{};
    float bits = 0.f, weight = 1.f;
#pragma unroll
    for (int i = 0; i < 8; ++i, weight *= kCodes) {
        const float u = __fmul_rn(x[first + i], factor);
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

template <class T>
struct Packed16;
template <>
struct Packed16<__nv_bfloat16> {
    using Pair = __nv_bfloat162;
    static constexpr float kWholes = 128.f;  // from here to twice it, patterns count in ones
};
template <>
struct Packed16<__half> {
    using Pair = __half2;
    static constexpr float kWholes = 1024.f;
};

// For each boundary the least x with fl(x * factor) above it, in both halves of a word.
template <class T>
struct Thresholds {
    using Pair = typename Packed16<T>::Pair;
    Pair least[kCodes - 1];

    // Where the thresholds are exact: x * factor does not underflow for any x, and no threshold is below a normal.
    __device__ static __forceinline__ bool applies(float factor) { return factor > 1.6e-5f && factor < 1024.f; }

    __device__ __forceinline__ Thresholds(float factor, float inverse) {
        constexpr SeedCodebook kBook{};
        constexpr int kMiddle = kCodes / 2 - 1;
        constexpr uint16_t kLeastPositive = 1, kSign = 0x8000;
        least[kMiddle] = both(kLeastPositive);
#pragma unroll
        for (int i = 1; i <= kMiddle; ++i) {
            const float boundary = kBook.boundaries[kMiddle + i];
            // The nearest x to boundary / factor is the threshold or its neighbour; its product tells.
            const T nearest = from_float<T>(boundary * inverse);
            const float product = __fmul_rn(to_float(nearest), factor);
            const uint16_t bits = *reinterpret_cast<const uint16_t*>(&nearest);
            least[kMiddle + i] = both(product > boundary ? bits : bits + 1);
            // -x * factor > -boundary: the greatest x with a product below the boundary, negated.
            least[kMiddle - i] = both((product < boundary ? bits : bits - 1) | kSign);
        }
    }

    // Codes of four elements, 12 bits. {a, b} and {c, d} lie in two words.
    __device__ __forceinline__ uint32_t four_codes(uint32_t ab, uint32_t cd) const {
        const uint32_t even = __byte_perm(ab, cd, 0x5410), odd = __byte_perm(ab, cd, 0x7632);
        const Pair ac = *reinterpret_cast<const Pair*>(&even), bd = *reinterpret_cast<const Pair*>(&odd);
        Pair count = both_values(Packed16<T>::kWholes);
        const Pair weight = both_values(kCodes);
#pragma unroll
        for (int b = 0; b < kCodes - 1; ++b) {
            count = __hadd2(count, __hge2(ac, least[b]));
            count = __hfma2(__hge2(bd, least[b]), weight, count);
        }
        const uint32_t codes = *reinterpret_cast<const uint32_t*>(&count) & 0x003f003fu;
        return (codes | codes >> 10) & 0xfffu;
    }

private:
    __device__ static __forceinline__ Pair both(uint32_t bits) {
        const uint32_t word = (bits & 0xffffu) * 0x10001u;
        return *reinterpret_cast<const Pair*>(&word);
    }
    __device__ static __forceinline__ Pair both_values(float value) {
        const T item = from_float<T>(value);
        return {item, item};
    }
};

// A lane's 32 codes as its three words of the stream.
struct Words {
    uint32_t word[3];

    // `bits` of `count` codes, which begin at code `first`.
    template <int kFirst>
    __device__ __forceinline__ void put(uint32_t bits) {
        constexpr int kWord = kFirst * kBits / 32, kShift = kFirst * kBits % 32;
        word[kWord] |= bits << kShift;
        if constexpr (kShift > 0 && kWord < 2) word[kWord + 1] |= bits >> (32 - kShift);
    }
};

template <class T, int kFirst = 0>
__device__ __forceinline__ void put_by_thresholds(Words& words, const Elements<T, kEncodePerLane>& x,
                                                  const Thresholds<T>& thresholds) {
    if constexpr (kFirst < kEncodePerLane) {
        words.put<kFirst>(thresholds.four_codes(x.words[kFirst / 2], x.words[kFirst / 2 + 1]));
        put_by_thresholds<T, kFirst + 4>(words, x, thresholds);
    }
}

template <class T>
__device__ __forceinline__ Words lane_codes(const Elements<T, kEncodePerLane>& x, float factor, float inverse) {
    Words words{};
    if constexpr (sizeof(T) == 2) {
        if (Thresholds<T>::applies(factor)) {
            put_by_thresholds<T>(words, x, Thresholds<T>(factor, inverse));
            return words;
        }
    }
    words.put<0>(eight_codes(x, 0, factor));
    words.put<8>(eight_codes(x, 8, factor));
    words.put<16>(eight_codes(x, 16, factor));
    words.put<24>(eight_codes(x, 24, factor));
    return words;
}

template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads)
    encode_kernel(VectorParams p, const T* __restrict__ vectors, uint32_t* __restrict__ codes,
                  float* __restrict__ radius, bool wide) {
    constexpr int kBlock = kLanes * kEncodePerLane;
    constexpr float kTiny = 1e-30f;
    const int lane = threadIdx.x % kLanes;
    const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
    const bool present = row < p.count;  // all lanes take part in shuffles
    const T* line = vectors + (present ? row : 0) * p.row_stride;
    Elements<T, kEncodePerLane> x;
    float square = 0.f;
    for (int first = 0; first < p.size; first += kBlock) {
        x.load(line, first + lane * kEncodePerLane, p.size, wide);
        square = __fadd_rn(square, block_square<kLanes>(x));
    }
    if (!present) return;
    const float length = __fsqrt_rn(square);
    const float factor = __fdiv_rn(p.root, fmaxf(length, kTiny));
    if (lane == 0) radius[row] = length;
    for (int first = 0; first < p.size; first += kBlock) {
        const int mine = first + lane * kEncodePerLane;
        if (p.size > kBlock) x.load(line, mine, p.size, wide);
        const Words words = lane_codes(x, factor, length * p.inverse_root);
        const int place = mine / 32 * 3, valid = (p.size - mine) * kBits;  // bits past the end are zero
        uint32_t* out = codes + row * p.code_words + place;
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            const int rest = valid - 32 * i;
            if (rest > 0) out[i] = rest >= 32 ? words.word[i] : words.word[i] & ((1u << rest) - 1u);
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
    for (int first = 0; first < p.size; first += kLanes * kDecodePerLane) {
        const int mine = first + lane * kDecodePerLane;
        const auto word = [&](int offset) {
            const int at = mine / 32 * 3 + offset;
            return at < p.code_words ? __ldg(line + at) : 0u;
        };
        const uint32_t middle = word(1), outer = word(lane % 2 == 0 ? 0 : 2);
        const uint64_t stream = lane % 2 == 0 ? outer | static_cast<uint64_t>(middle) << 32
                                              : middle >> 16 | static_cast<uint64_t>(outer) << 16;
        Elements<T, kDecodePerLane> x;
#pragma unroll
        for (int i = 0; i < kDecodePerLane; ++i) {
            const int code = static_cast<int>(stream >> (kBits * i)) & (kCodes - 1);
            x.items[i] = from_float<T>(__fmul_rn(__shfl_sync(kFullWarp, level, code, kCodes), scale));
        }
        if (present) x.store(vectors + row * p.row_stride, mine, p.size, wide);
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
template <int kPerLane, class Body>
cudaError_t dispatch(const VectorParams& p, Body body) {
    if (p.count == 0) return cudaSuccess;
    const auto by_lanes = [&](auto element) {
        constexpr int kMostLanes = kMostElements / kPerLane;
        if (p.size <= kMostElements / 4) return body(element, std::integral_constant<int, kMostLanes / 4>{});
        if (p.size <= kMostElements / 2) return body(element, std::integral_constant<int, kMostLanes / 2>{});
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
    return dispatch<kEncodePerLane>(p, [&](auto element, auto lanes) {
        using T = decltype(element);
        encode_kernel<T, lanes.value><<<grid_size<T, lanes.value>(p), kThreads, 0, stream>>>(
            p, static_cast<const T*>(vectors), codes, radius, is_wide<T>(p, vectors));
    });
}

cudaError_t launch_decode(const VectorParams& p, const uint32_t* codes, const float* radius, void* vectors,
                          cudaStream_t stream) {
    return dispatch<kDecodePerLane>(p, [&](auto element, auto lanes) {
        using T = decltype(element);
        decode_kernel<T, lanes.value><<<grid_size<T, lanes.value>(p), kThreads, 0, stream>>>(
            p, codes, radius, static_cast<T*>(vectors), is_wide<T>(p, vectors));
    });
}

}  // namespace mq
