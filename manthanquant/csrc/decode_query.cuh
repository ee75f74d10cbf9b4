// Queries into coded space and outputs back, a row (one query token and head) a warp.
//
// A structured transform is a gather, a multiplication and Hadamard butterflies: a few hundred instructions that run
// while a segment's first blocks are still on their way. Queries become 15-bit integers, split as high * 128 + low into
// two int8 planes: the matrix instruction's eight columns hold four rows twice, and the spare precision is free.
#pragma once

#include <cuda_bf16.h>

#include "codebook.h"
#include "decode_codes.cuh"
#include "decode_plan.cuh"

namespace mq {

constexpr float kQueryLimit = 127 * 128;  // |high| <= 127 and |low| <= 64
constexpr int kQueryRadix = 128;

// An element as it lies in memory, and what it means: apart, so that nothing waits for the load before it must.
__device__ __forceinline__ uint32_t load_raw(const void* base, int64_t index, Dtype dtype) {
    if (dtype == Dtype::kFp32) return static_cast<const uint32_t*>(base)[index];
    return static_cast<const uint16_t*>(base)[index];
}

__device__ __forceinline__ float to_float(uint32_t raw, Dtype dtype) {
    if (dtype == Dtype::kBf16) return __uint_as_float(raw << 16);
    if (dtype == Dtype::kFp16) return __half2float(__ushort_as_half(static_cast<unsigned short>(raw)));
    return __uint_as_float(raw);
}

__device__ __forceinline__ void store_element(void* base, int64_t index, Dtype dtype, float value) {
    if (dtype == Dtype::kBf16) static_cast<__nv_bfloat16*>(base)[index] = __float2bfloat16(value);
    else if (dtype == Dtype::kFp16) static_cast<__half*>(base)[index] = __float2half(value);
    else static_cast<float*>(base)[index] = value;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
    return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
    return x;
}

// Unscaled Hadamard butterflies over a class of channels, in blocks of the largest power of two that divides it.
// Channel 32 i + lane is x[i]; channels past the class are ignored.
template <int kChannels, int kSlots>
__device__ __forceinline__ void hadamard(float (&x)[kSlots], int lane) {
    static_assert(kSlots == (kChannels + 31) / 32);
    constexpr int kBlock = kChannels & -kChannels;
#pragma unroll
    for (int step = 1; step < kBlock && step < 32; step *= 2) {
#pragma unroll
        for (int i = 0; i < kSlots; ++i) {
            const float other = __shfl_xor_sync(kFullWarp, x[i], step);
            x[i] = lane & step ? other - x[i] : other + x[i];
        }
    }
#pragma unroll
    for (int step = 32; step < kBlock; step *= 2) {
#pragma unroll
        for (int i = 0; i < kSlots; ++i) {
            if (i & (step / 32)) continue;
            const float low = x[i], high = x[i + step / 32];
            x[i] = low + high, x[i + step / 32] = low - high;
        }
    }
}

// A row of queries as the matrix instructions take it. Strides are padded by 16 bytes against bank conflicts.
template <int kRows, int kHeadSize>
struct QueryTile {
    static constexpr int kStride = kHeadSize + 16;
    alignas(16) int8_t planes[2][kRows][kStride];  // high, low
    float scale[kRows][2];                         // a class: of the integer score, times the key's scale: log2 units
    float offset[kRows][2];                        // a class: to add to the integer score, for 4-bit elements
    float mean_score[kRows];                       // query . key mean in log2 units
};

// The matrix instructions' eight columns. Four rows: column g is a row's high (even g) or low part. More: tiles of
// eight rows, with a plane for the high parts and one for the low. Lane c of a C fragment has columns 2 c and 2 c + 1
// of each tile, and so kRows / 4 neighbouring rows.
template <int kRows>
constexpr int column_tiles() {
    return kRows == 4 ? 1 : kRows / 8;
}

// Which part (0: high) and which row column g of a plane is.
template <int kRows>
__device__ __forceinline__ int column_part(int plane, int g) {
    return kRows == 4 ? g % 2 : plane % 2;
}
template <int kRows>
__device__ __forceinline__ int column_row(int plane, int g) {
    return kRows == 4 ? g / 2 : kRows / 4 * (g / 2) + plane / 2 * 2 + g % 2;
}

// Rows as bf16, for exact keys and dense matrices: high + low is an element to 16 bits (bf16 queries have low = 0).
template <int kRows, int kHeadSize>
struct SplitRows {
    static constexpr int kStride = kHeadSize + 8;
    alignas(16) __nv_bfloat16 planes[2][kRows][kStride];

    __device__ __forceinline__ void store(int row, int channel, float x) {
        const __nv_bfloat16 high = __float2bfloat16(x);
        planes[0][row][channel] = high;
        planes[1][row][channel] = __float2bfloat16(x - __bfloat162float(high));
    }

    // What lane group g has for its column of operand `plane`.
    __device__ __forceinline__ const __nv_bfloat16* column(int plane, int g) const {
        return planes[column_part<kRows>(plane, g)][column_row<kRows>(plane, g)];
    }
};

// Which query a row of a tile is.
struct RowPlace {
    bool valid;  // false: the tile is larger than the rows there are
    int token;   // among the request's new tokens
    int head;    // query head
};

// `queries`: new tokens of the segment's request.
template <int kRows>
__device__ __forceinline__ RowPlace row_place(const DecodeParams& params, const Segment& segment, int queries,
                                              int row) {
    const int index = segment.row_tile * kRows + row;
    const int token = params.query_tokens == 1 ? 0 : index / params.group;
    return {index < queries * params.group, token, segment.head * params.group + index - token * params.group};
}

// Elements of a row that a lane holds: element i of a class is channel 32 i + lane of it.
template <class Side>
struct RowSlots {
    MQ_HOST_DEVICE static constexpr int count(int cls) { return (Side::channels(cls) + 31) / 32; }
    MQ_HOST_DEVICE static constexpr int first(int cls) { return cls == 0 ? 0 : count(0); }
    static constexpr int total = count(0) + (Side::classes == 2 ? count(1) : 0);

    // The channel (in coded order) of slot i, or -1 for none.
    __device__ static __forceinline__ int channel(int i, int lane) {
        const int cls = i >= count(0), in_class = 32 * (i - first(cls)) + lane;
        return in_class < Side::channels(cls) ? Side::first_channel(cls) + in_class : -1;
    }
};

// A structured transform's factors and order for one KV head: model constants, so they may be read at any time.
template <class Side>
struct TransformRow {
    using Slots = RowSlots<Side>;
    float factor[Slots::total];
    int channel[Slots::total];  // in the model's order; -1: none

    __device__ __forceinline__ void load(const StructuredTransform& transform, int kv_head, int lane) {
        const int64_t first = kv_head * transform.head_stride;
#pragma unroll
        for (int i = 0; i < Slots::total; ++i) {
            const int coded = Slots::channel(i, lane);
            const bool structured = transform.factor != nullptr && coded >= 0;
            factor[i] = structured ? __ldg(transform.factor + first + coded) : 1.0f;
            channel[i] = structured && transform.order != nullptr ? __ldg(transform.order + first + coded) : coded;
        }
    }
};

// Whether scores need the query's product with the key mean: keys that are exact had no mean taken off, and the soft
// cap and learned sinks see absolute scores. Otherwise it is the same for every key of a row and the softmax drops it.
template <bool kHasExact>
__device__ __forceinline__ bool needs_mean_score(const DecodeParams& params) {
    return params.key_mean != nullptr &&
           (kHasExact || params.soft_cap_log2 > 0.0f || params.sink_logits != nullptr);
}

// A row's queries on their way from memory: addresses first, then loads, then (in `prepare_row`) arithmetic, so that
// other work hides each latency.
template <int kHeadSize>
struct QueryRow {
    static constexpr int kSlots = (kHeadSize + 31) / 32;
    int64_t first;         // of the row in the query
    uint32_t raw[kSlots];  // channel 32 i + lane of the query

    template <int kRows>
    __device__ __forceinline__ void locate(const DecodeParams& params, const Segment& segment,
                                           const QueryRange& queries, int row) {
        const RowPlace place = row_place<kRows>(params, segment, queries.count, row);
        // A row that does not exist repeats the pair's first; nobody reads what becomes of it.
        const int64_t token = queries.first + (place.valid ? place.token : 0);
        const int head = place.valid ? place.head : segment.head * params.group;
        first = token * params.query_token_stride + head * params.query_head_stride;
    }

    __device__ __forceinline__ void load(const DecodeParams& params, int lane) {
#pragma unroll
        for (int i = 0; i < kSlots; ++i) {
            raw[i] = 0;
            if (32 * i + lane < kHeadSize) raw[i] = load_raw(params.query, first + 32 * i + lane, params.query_dtype);
        }
    }
};

// One class of one row: transform, quantise, store. `row_values`: the query's channels, in shared memory; `dense`:
// already multiplied by a matrix.
template <class Unit, int kCls, int kRows>
__device__ __forceinline__ void prepare_class(const DecodeParams& params, const float* row_values,
                                              const TransformRow<typename Unit::Key>& transform, int row,
                                              QueryTile<kRows, Unit::head_size>& tile, bool dense, int lane) {
    using Key = typename Unit::Key;
    using Slots = RowSlots<Key>;
    constexpr int kChannels = Key::channels(kCls), kBits = Key::bits(kCls), kSlots = Slots::count(kCls);
    float x[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
        const int slot = Slots::first(kCls) + i, channel = transform.channel[slot];
        x[i] = channel >= 0 ? row_values[channel] * transform.factor[slot] : 0.0f;
    }
    if (!dense) hadamard<kChannels>(x, lane);

    float largest = 1e-30f;
    bool finite = true;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
        if (32 * i + lane >= kChannels) continue;
        largest = fmaxf(largest, fabsf(x[i]));
        finite = finite && isfinite(x[i]);
    }
    largest = warp_max(largest);
    finite = __all_sync(kFullWarp, finite);

    const float inverse = __fdividef(kQueryLimit, largest);
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
        if (32 * i + lane >= kChannels) continue;
        const int channel = Key::first_channel(kCls) + 32 * i + lane;
        const int value = __float2int_rn(x[i] * inverse);
        const int high = (value + kQueryRadix / 2) >> 7;
        tile.planes[0][row][channel] = static_cast<int8_t>(high);
        tile.planes[1][row][channel] = static_cast<int8_t>(value - high * kQueryRadix);
        sum += value;
    }
    if constexpr (kTwiceElementOffset<kBits> != 0) sum = __reduce_add_sync(kFullWarp, sum);
    if (lane == 0) {
        constexpr float kScaleUnit = (Key::classes == 2 ? 1 << kE4m4Exponent : 1) / Codebook<kBits>::unit;
        // A query that is not finite makes its own row NaN, and no other.
        tile.scale[row][kCls] = finite ? largest * (params.scale_log2 * kScaleUnit / kQueryLimit) : __int_as_float(-1);
        tile.offset[row][kCls] = -0.5f * kTwiceElementOffset<kBits> * sum;
    }
}

// Collective over a warp: one row of a pair into the tiles. `mean`: the key mean, channel 32 i + lane. `scratch`: D
// floats of shared memory for this warp, by which channels change lanes; `dense`: they hold the row times a matrix.
template <class Unit, bool kHasExact, int kRows>
__device__ __forceinline__ void prepare_row(const DecodeParams& params, const QueryRow<Unit::head_size>& query,
                                            const TransformRow<typename Unit::Key>& transform,
                                            const float (&mean)[QueryRow<Unit::head_size>::kSlots], int row,
                                            float* scratch, QueryTile<kRows, Unit::head_size>& tile,
                                            SplitRows<kRows, Unit::head_size>* exact_tile, bool dense,
                                            int lane) {
    float mean_score = 0.0f;
#pragma unroll
    for (int i = 0; i < QueryRow<Unit::head_size>::kSlots; ++i) {
        const int channel = 32 * i + lane;
        if (channel >= Unit::head_size) continue;
        const float x = to_float(query.raw[i], params.query_dtype);
        if (!dense) scratch[channel] = x;
        mean_score += x * mean[i];
        if constexpr (kHasExact) exact_tile->store(row, channel, x);
    }
    if (needs_mean_score<kHasExact>(params)) mean_score = warp_sum(mean_score) * params.scale_log2;
    if (lane == 0) tile.mean_score[row] = mean_score;
    __syncwarp();
    prepare_class<Unit, 0>(params, scratch, transform, row, tile, dense, lane);
    if constexpr (Unit::Key::classes == 2) prepare_class<Unit, 1>(params, scratch, transform, row, tile, dense, lane);
}

// One class of one output row, from coded space (`coded`, shared memory, normalised) to the caller's tensor.
// `exact`: the exact tier's share in the model's own channels, or null.
template <class Unit, int kCls>
__device__ __forceinline__ void finish_class(const DecodeParams& params,
                                             const TransformRow<typename Unit::Value>& transform, const float* coded,
                                             const float* exact, int64_t out_first, int lane) {
    using Value = typename Unit::Value;
    using Slots = RowSlots<Value>;
    constexpr int kChannels = Value::channels(kCls), kFirst = Value::first_channel(kCls), kSlots = Slots::count(kCls);
    float x[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) x[i] = 32 * i + lane < kChannels ? coded[kFirst + 32 * i + lane] : 0.0f;
    hadamard<kChannels>(x, lane);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
        const int channel = transform.channel[Slots::first(kCls) + i];
        if (channel < 0) continue;
        float value = x[i] * transform.factor[Slots::first(kCls) + i];
        if (exact != nullptr) value += exact[channel];
        store_element(params.out, out_first + channel, params.out_dtype, value);
    }
}

}  // namespace mq
