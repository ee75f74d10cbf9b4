// Scores: integer dot products of key codes with queries, made floats by the token's and the query's scale, a class of
// channels at a time. Then masks and the soft cap, at the edges of what rows see.
#pragma once

#include "decode_codes.cuh"
#include "decode_variant.cuh"

namespace mq {

// A warp's queries as B operands, and how integer scores become floats.
template <class V>
struct QueryFragment {
    uint32_t operand[V::kQueryPlanes][V::kHeadSize / 16];
    float scale[V::Unit::Key::classes][V::kRowsPerLane];
    float offset[V::Unit::Key::classes][V::kRowsPerLane];

    __device__ __forceinline__ void load(const QueryTile<V::kRows, V::kHeadSize>& tile, int lane) {
        const int g = lane / 4, c = lane % 4;
#pragma unroll
        for (int plane = 0; plane < V::kQueryPlanes; ++plane) {
            const int8_t* row = tile.planes[column_part<V::kRows>(plane, g)][column_row<V::kRows>(plane, g)];
#pragma unroll
            for (int i = 0; i < V::kHeadSize / 16; ++i)
                operand[plane][i] = *reinterpret_cast<const uint32_t*>(row + 16 * i + 4 * c);
        }
#pragma unroll
        for (int cls = 0; cls < V::Unit::Key::classes; ++cls)
#pragma unroll
            for (int h = 0; h < V::kRowsPerLane; ++h) {
                scale[cls][h] = tile.scale[V::kRowsPerLane * c + h][cls];
                offset[cls][h] = tile.offset[V::kRowsPerLane * c + h][cls];
            }
    }
};

// Integer dot products of 16 tokens with the rows, one class: dots[half][h] of token g + 8 half.
template <class V, int kCls>
__device__ __forceinline__ void score_class(const uint32_t* words, const QueryFragment<V>& query,
                                            const Decoder& decoder, int (&dots)[2][V::kRowsPerLane]) {
    using Key = typename V::Unit::Key;
    constexpr int kBits = Key::bits(kCls), kRegisters = Key::registers(kCls), kPerToken = kRegisters / 2;
    constexpr int kFirst = Key::first_channel(kCls) / 16;
    uint32_t e[kRegisters];
    decoder.registers<kBits, kRegisters, 0, kRegisters>(words + Key::first_word(kCls), e);

    int sum[V::kQueryPlanes][4] = {};
#pragma unroll
    for (int plane = 0; plane < V::kQueryPlanes; ++plane) {
        const uint32_t* q = query.operand[plane] + kFirst;
#pragma unroll
        for (int j = 0; j + 1 < kPerToken; j += 2)
            mma_s8s8(sum[plane], e[j], e[kPerToken + j], e[j + 1], e[kPerToken + j + 1], q[j], q[j + 1]);
        if constexpr (kPerToken % 2 == 1)
            mma_s8s8_k16(sum[plane], e[kPerToken - 1], e[kRegisters - 1], q[kPerToken - 1]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if constexpr (V::kRowsPerLane == 1) {
            dots[half][0] = sum[0][2 * half] * kQueryRadix + sum[0][2 * half + 1];
        } else {
#pragma unroll
            for (int h = 0; h < V::kRowsPerLane; ++h)
                dots[half][h] = sum[h / 2 * 2][2 * half + h % 2] * kQueryRadix + sum[h / 2 * 2 + 1][2 * half + h % 2];
        }
    }
}

// Scores of a block: scores[unit][half][h] of token 16 unit + 8 half + g, before any mask.
template <class V>
__device__ __forceinline__ void score_block(const uint8_t* block, const uint32_t (&key_scales)[kBlockUnits],
                                            const QueryFragment<V>& query, const Decoder& decoder, int lane,
                                            float (&scores)[kBlockUnits][2][V::kRowsPerLane]) {
    using Key = typename V::Unit::Key;
#pragma unroll
    for (int unit = 0; unit < kBlockUnits; ++unit) {
        uint32_t words[Key::words];
        load_words(words, block + unit * V::Unit::bytes, lane);
        static_for<Key::classes>([&](auto cls) {
            int dots[2][V::kRowsPerLane];
            score_class<V, cls>(words, query, decoder, dots);
            const float2 scale = __half22float2(class_scales<Key>(key_scales[unit], cls));
#pragma unroll
            for (int h = 0; h < V::kRowsPerLane; ++h) {
                float low = static_cast<float>(dots[0][h]), high = static_cast<float>(dots[1][h]);
                if constexpr (kTwiceElementOffset<Key::bits(cls)> != 0)
                    low += query.offset[cls][h], high += query.offset[cls][h];
                const float low_scale = scale.x * query.scale[cls][h], high_scale = scale.y * query.scale[cls][h];
                scores[unit][0][h] = cls == 0 ? low * low_scale : fmaf(low, low_scale, scores[unit][0][h]);
                scores[unit][1][h] = cls == 0 ? high * high_scale : fmaf(high, high_scale, scores[unit][1][h]);
            }
        });
    }
}

// cap * tanh(score / cap) on a score that lacks the key mean's share; all in log2 units.
__device__ __forceinline__ float soft_capped(float score, float mean_score, float cap) {
    constexpr float kTwoLog2E = 2.885390082f;  // tanh(x) = 1 - 2 / (exp(2 x) + 1)
    const float power = exp2_approx((score + mean_score) * __fdividef(kTwoLog2E, cap));
    return cap * (1.0f - 2.0f * reciprocal_approx(power + 1.0f));
}

// Whether the coded copy of a unit counts: not if the unit is exact.
template <class V>
__device__ __forceinline__ bool counts_as_coded(const TeamShared<V>& shared, int unit) {
    if constexpr (V::kHasExact) {
        const int index = shared.span.exact_index(unit);
        return index < 0 || shared.exact.slots[index] < 0;
    }
    return true;
}

// Masks and caps the scores of a block at an edge of what rows see. Also clears value scales past the sequence: those
// bytes may be anything.
template <class V>
__device__ __forceinline__ void edit_block(const DecodeParams& params, const TeamShared<V>& shared, int block, int lane,
                                           float (&scores)[kBlockUnits][2][V::kRowsPerLane],
                                           uint32_t (&value_scales)[kBlockUnits]) {
    const int first_row = V::kRowsPerLane * (lane % 4), first_token = block * kBlockTokens + lane / 4;
    if (params.soft_cap_log2 > 0.0f) {
#pragma unroll
        for (int unit = 0; unit < kBlockUnits; ++unit)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int h = 0; h < V::kRowsPerLane; ++h)
                    scores[unit][half][h] = soft_capped(scores[unit][half][h], shared.query.mean_score[first_row + h],
                                                        params.soft_cap_log2);
    }
#pragma unroll
    for (int unit = 0; unit < kBlockUnits; ++unit) {
        const bool counts = counts_as_coded(shared, block * kBlockUnits + unit);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int token = first_token + unit * kUnitTokens + 8 * half;
            if (token >= shared.length) value_scales[unit] &= half == 0 ? 0xffff0000u : 0x0000ffffu;
#pragma unroll
            for (int h = 0; h < V::kRowsPerLane; ++h) {
                const bool sees = token >= shared.row_begin[first_row + h] && token < shared.row_end[first_row + h];
                if (!sees || !counts) scores[unit][half][h] = kMasked;
            }
        }
    }
}

}  // namespace mq
