// Values: probabilities times the tokens' value scales become 16-bit integers, whose bytes meet the value codes in
// integer matrix instructions. The transposition that P V needs is one of probabilities, never of codes.
#pragma once

#include "decode_codes.cuh"
#include "decode_variant.cuh"

namespace mq {

constexpr float kProbabilityLimit = 65504.0f;  // probabilities are 16-bit integers, high * 256 + low
constexpr int kProbabilityRadix = 256;
constexpr float kIntegerBias = 8388608.0f;  // 2^23: adding it leaves an integer in a float's low bits
constexpr uint32_t kIntegerBiasBits = 0x4B000000u;
constexpr float kSmallestScale = 5.9604645e-8f;  // of fp16: a block whose values are all zero has a scale too

// A block's probabilities times value scales of one class, as 16-bit integers in B operands.
template <class V, int kCls>
struct ProbabilityFragment {
    uint32_t operand[V::kQueryPlanes][kBlockUnits];
    float offset[V::kRowsPerLane];  // to add to the integer sums, for 4-bit elements
    float scale;                    // of the integer sums

    __device__ __forceinline__ ProbabilityFragment(const float (&probabilities)[kBlockUnits][2][V::kRowsPerLane],
                                                   const uint32_t (&value_scales)[kBlockUnits]) {
        using Value = typename V::Unit::Value;
        constexpr int kBits = Value::bits(kCls);
        constexpr float kScaleUnit = (Value::classes == 2 ? 1 << kE4m4Exponent : 1) / Codebook<kBits>::unit;
        __half2 both = class_scales<Value>(value_scales[0], kCls);
#pragma unroll
        for (int unit = 1; unit < kBlockUnits; ++unit)
            both = __hmax2(both, class_scales<Value>(value_scales[unit], kCls));
        both = __hmax2(both, __lowhigh2highlow(both));
#pragma unroll
        for (int step = 4; step < kLanes; step *= 2) both = __hmax2(both, __shfl_xor_sync(kFullWarp, both, step));
        const float largest = fmaxf(__low2float(both), kSmallestScale);
        const float to_integer = reciprocal_approx(largest) * kProbabilityLimit;
        scale = largest * (kScaleUnit / kProbabilityLimit);

        uint32_t total[V::kRowsPerLane] = {};
#pragma unroll
        for (int unit = 0; unit < kBlockUnits; ++unit) {
            const float2 value_scale = __half22float2(class_scales<Value>(value_scales[unit], kCls));
            const float factor[2] = {value_scale.x * to_integer, value_scale.y * to_integer};
            uint32_t bytes[V::kRowsPerLane];  // high of token g, high of g + 8, low, low
#pragma unroll
            for (int h = 0; h < V::kRowsPerLane; ++h) {
                uint32_t integer[2];
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    integer[half] = __float_as_uint(fmaf(probabilities[unit][half][h], factor[half], kIntegerBias));
                bytes[h] = prmt(integer[0], integer[1], 0x4051);
                total[h] += integer[0] + integer[1] - 2 * kIntegerBiasBits;
            }
            if constexpr (V::kRowsPerLane == 1) {
                operand[0][unit] = transpose_8x8(bytes[0]);
            } else {
#pragma unroll
                for (int h = 0; h < V::kRowsPerLane; h += 2) {
                    operand[h][unit] = transpose_8x8(prmt(bytes[h], bytes[h + 1], 0x5410));
                    operand[h + 1][unit] = transpose_8x8(prmt(bytes[h], bytes[h + 1], 0x7632));
                }
            }
        }
        if constexpr (kTwiceElementOffset<kBits> != 0) {
#pragma unroll
            for (int h = 0; h < V::kRowsPerLane; ++h) {
                int sum = static_cast<int>(total[h]);
#pragma unroll
                for (int step = 4; step < kLanes; step *= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
                offset[h] = -0.5f * kTwiceElementOffset<kBits> * sum;
            }
        }
    }
};

// A lane's value words of a block.
template <class V>
using ValueWords = uint32_t[kBlockUnits][V::Unit::Value::words];

// Adds registers [kFirst, kFirst + kCount) of one class to the output.
template <class V, int kCls, int kFirst, int kCount>
__device__ __forceinline__ void accumulate_pass(const ValueWords<V>& words,
                                                const ProbabilityFragment<V, kCls>& fragment, const Decoder& decoder,
                                                float (&out)[V::kChannelTiles][V::kRowsPerLane]) {
    using Value = typename V::Unit::Value;
    constexpr int kBits = Value::bits(kCls), kRegisters = Value::registers(kCls), kTiles = kCount / 2;
    int sum[V::kQueryPlanes][kTiles][4] = {};
#pragma unroll
    for (int unit = 0; unit < kBlockUnits; unit += 2) {
        uint32_t e[2][kCount];
#pragma unroll
        for (int i = 0; i < 2; ++i)
            decoder.registers<kBits, kRegisters, kFirst, kCount>(words[unit + i] + Value::first_word(kCls), e[i]);
#pragma unroll
        for (int plane = 0; plane < V::kQueryPlanes; ++plane)
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile)
                mma_s8u8(sum[plane][tile], e[0][2 * tile], e[0][2 * tile + 1], e[1][2 * tile], e[1][2 * tile + 1],
                         fragment.operand[plane][unit], fragment.operand[plane][unit + 1]);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int h = 0; h < V::kRowsPerLane; ++h) {
                // One row a lane: high and low are columns. More: planes of their own.
                constexpr bool kOne = V::kRowsPerLane == 1;
                const int high = kOne ? sum[0][tile][2 * half] : sum[h / 2 * 2][tile][2 * half + h % 2];
                const int low = kOne ? sum[0][tile][2 * half + 1] : sum[h / 2 * 2 + !kOne][tile][2 * half + h % 2];
                const int integer = high * kProbabilityRadix + low;
                float sum_of_elements = static_cast<float>(integer);
                if constexpr (kTwiceElementOffset<kBits> != 0) sum_of_elements += fragment.offset[h];
                float& sum_out = out[Value::first_channel(kCls) / 8 + kFirst + 2 * tile + half][h];
                sum_out = fmaf(sum_of_elements, fragment.scale, sum_out);
            }
}

// Adds one class of a block's values to the output, eight registers (four tiles of 16 channels) at a time.
template <class V, int kCls>
__device__ __forceinline__ void accumulate_class(const ValueWords<V>& words,
                                                 const float (&probabilities)[kBlockUnits][2][V::kRowsPerLane],
                                                 const uint32_t (&value_scales)[kBlockUnits], const Decoder& decoder,
                                                 float (&out)[V::kChannelTiles][V::kRowsPerLane]) {
    constexpr int kPass = 8, kRegisters = V::Unit::Value::registers(kCls);
    const ProbabilityFragment<V, kCls> fragment(probabilities, value_scales);
    static_for<ceil_div(kRegisters, kPass)>([&](auto pass) {
        constexpr int kFirst = pass * kPass, kCount = kRegisters - kFirst < kPass ? kRegisters - kFirst : kPass;
        accumulate_pass<V, kCls, kFirst, kCount>(words, fragment, decoder, out);
    });
}

}  // namespace mq
