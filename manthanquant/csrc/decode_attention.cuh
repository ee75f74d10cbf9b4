// Decode attention over packed pages: softmax(q K^T) V for one or a few new tokens a request, one launch.
//
// The idea. The cache is a sixth of bf16's bytes, so the kernel must keep the memory system busy while it turns codes
// back into numbers. Three decisions make that cheap:
//
// 1. Codes lie in the order of the int8 matrix instruction's A operand (formats.py). A lane reads its words once,
//    without bank conflicts, permutes bytes (decode_codes.cuh) and multiplies; codes never move between lanes.
// 2. N = 8 columns are more than four query heads need, so queries and probabilities are split into a high and a low
//    byte, a column each: 15 and 16 bits of precision at the price of 8. (With eight rows the two bytes take two
//    instructions, with sixteen four; codes are still read and decoded once.) Scores are taken in coded space: the
//    query is transformed once, the output once.
// 3. A warp is an independent flash-decoding worker (Dao et al. 2023): its own ring of blocks in shared memory, its own
//    running maximum and sum. A team of warps shares a stretch of blocks and merges once a segment, in shared memory;
//    teams that share a pair merge through global memory, and the last to arrive writes the output.
//
// Names: a unit is 16 tokens, a block 4 units; a row is one (query token, query head) of a KV head, a pair a tile of
// kRows rows with the KV head's cache; an item is a block of codes or a unit of exact keys and values. A warp's lane is
// 4 g + c: g names tokens (and channels), c names rows: lane c works for rows kRowsPerLane * c onwards.
//
// Softmax is in powers of two: scores carry a factor log2(e).
#pragma once

#include <initializer_list>
#include <type_traits>
#include <utility>

#include "decode_codes.cuh"
#include "decode_exact.cuh"
#include "decode_plan.cuh"
#include "decode_query.cuh"
#include "decode_stream.cuh"

#ifndef MQ_SM
#error "define MQ_SM, the architecture built for, e.g. 90"
#endif
#ifndef MQ_BULK_COPY
#define MQ_BULK_COPY (MQ_SM >= 90)
#endif

namespace mq {

constexpr float kLowestMax = -1e20f;  // below every score and above -inf: a row that has seen nothing has exp2 = 0
constexpr float kMasked = -INFINITY;
constexpr float kProbabilityLimit = 65504.0f;  // probabilities are 16-bit integers, high * 256 + low
constexpr int kProbabilityRadix = 256;
constexpr float kIntegerBias = 8388608.0f;  // 2^23: adding it leaves an integer in a float's low bits
constexpr uint32_t kIntegerBiasBits = 0x4B000000u;
constexpr float kSmallestScale = 5.9604645e-8f;  // of fp16: a block whose values are all zero has a scale too
constexpr int kMaxExactUnits = 128;  // a sequence's sinks and recent units; at most 32 a warp, see ItemStream

constexpr int kSharedLimit =                 // bytes a CTA may have
    (MQ_SM == 80 ? 163 : MQ_SM == 86 || MQ_SM == 89 || MQ_SM == 120 ? 99 : 227) * 1024;

// Teams of a CTA, when they are small.
constexpr int most_teams(int warps) { return warps > 8 ? 4 : 2; }

// The most warps up to `most` whose shares of shared memory fit beside what the teams take.
constexpr int warps_that_fit(int most, int warp_bytes, int team_bytes) {
    for (int warps : {16, 12, 8, 4})
        if (warps <= most && warps * warp_bytes + most_teams(warps) * team_bytes <= kSharedLimit) return warps;
    return 2;
}

// What a kernel is built for, and how it is tuned for that.
template <class F, int kHeadSize_, int kRows_, int kTeamWarps_, bool kHasExact_>
struct Variant {
    using Unit = mq::Unit<F, kHeadSize_>;
    static constexpr int kHeadSize = kHeadSize_;
    static constexpr int kRows = kRows_;
    static constexpr int kRowsPerLane = kRows / 4;
    static constexpr int kTeamWarps = kTeamWarps_;
    static constexpr bool kHasExact = kHasExact_;
    static constexpr bool kBulkCopy = MQ_BULK_COPY;

    // As many warps as registers and shared memory allow: the output and the accumulators of a large head or of many
    // rows take more of both.
    static constexpr int kRegisterWarps =
        kHeadSize > 128 || kRows == 16 ? 8 : (kRows == 8 && kHeadSize > 64 ? 12 : 16);
    static constexpr int kSlotBytes = slot_bytes<Unit, kHasExact>();
    static constexpr int kWarpBytes = kSlotBytes + (kHasExact ? 2 : 1) * kRows * kHeadSize * 4;
    static constexpr int kTeamBytes =
        2 * kRows * (kHeadSize + 16) + (kHasExact ? 4 * (kRows * (kHeadSize + 8) + kMaxExactUnits) : 0) + 1024;
    static constexpr int kWarps = warps_that_fit(kRegisterWarps, kWarpBytes, kTeamBytes);
    static constexpr int kTeams = kWarps / kTeamWarps;
    static constexpr int kThreads = kWarps * kLanes;
    // About 100 KB in flight fill the memory system; more makes the SMs finish unequally.
    static constexpr bool kTwoStages =
        2 * kWarps * kSlotBytes <= 112 * 1024 &&
        kWarps * (kSlotBytes + kWarpBytes) + most_teams(kWarps) * kTeamBytes <= kSharedLimit;
    static constexpr int kStages = kTwoStages ? 2 : 1;

    using Stream = ItemStream<Unit, kStages, kTeamWarps, kBulkCopy, kHasExact>;
    static_assert(kRows == 4 || kRows == 8 || kRows == 16);
    static_assert(kTeamWarps % kRowsPerLane == 0);

    static constexpr int kChannelTiles = kHeadSize / 8;          // of eight channels
    static constexpr int kTileFloats = kRows * kHeadSize;
    static constexpr int kOutStride = kHeadSize + 4;             // of a finished row in shared memory
    // A thread's share of a merged tile: channel tile x, row h of lane c is at (x * kRowsPerLane + h) * 32 + lane.
    static constexpr int kShare = ceil_div(kChannelTiles * kRowsPerLane, kTeamWarps);
    static constexpr int kPartialFloats = kTeamWarps * kLanes * kShare;
    static constexpr int kQueryPlanes = kRowsPerLane;  // operands: high and low share one, or each column tile has both
};

// A warp's running softmax over its rows.
template <int kRowsPerLane>
struct SoftmaxState {
    float max[kRowsPerLane];
    float sum[kRowsPerLane];  // of this lane's tokens

    __device__ __forceinline__ SoftmaxState() {
#pragma unroll
        for (int h = 0; h < kRowsPerLane; ++h) max[h] = kLowestMax, sum[h] = 0.0f;
    }

    // Raises the maxima to those of new scores (of this lane); returns what old sums are to be multiplied by.
    __device__ __forceinline__ void raise(const float (&seen)[kRowsPerLane], float (&rescale)[kRowsPerLane]) {
#pragma unroll
        for (int h = 0; h < kRowsPerLane; ++h) {
            float highest = seen[h];
#pragma unroll
            for (int step = 4; step < kLanes; step *= 2)
                highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, step));
            highest = fmaxf(max[h], highest);
            rescale[h] = exp2_approx(max[h] - highest);
            max[h] = highest;
            sum[h] *= rescale[h];
        }
    }
};

// Each warp's output fragment and softmax state (maximum, sum), for the team to merge.
template <class V>
struct Fragments {
    float tile[V::kTeamWarps * V::kTileFloats];
    float2 state[V::kTeamWarps][V::kRows];
};

template <class V>
struct ExactShared {
    Fragments<V> fragments;
    ExactQueryTile<V::kRows, V::kHeadSize> query;
    int slots[kMaxExactUnits];  // of the pair's exact units; negative: not exact after all
};
struct NoExactShared {};

// What a team shares. The coded fragments' memory also holds the queries while they are transformed, and finished rows.
template <class V>
struct TeamShared {
    Fragments<V> coded;
    QueryTile<V::kRows, V::kHeadSize> query;
    int row_begin[V::kRows];  // the tokens each row sees
    int row_end[V::kRows];
    int length;
    QueryRange queries;
    Span span;
    Work<V::kHasExact> work;  // its segment is the one in work
    bool is_last;
    std::conditional_t<V::kHasExact, ExactShared<V>, NoExactShared> exact;
};

template <class V>
struct SharedLayout {
    static constexpr int kStreams = V::kWarps * V::Stream::kRingBytes;
    static constexpr int kTeamsOffset = (kStreams + V::kWarps * sizeof(typename V::Stream::Shared) + 127) / 128 * 128;
    static constexpr int kTeamBytes = (sizeof(TeamShared<V>) + 127) / 128 * 128;
    static constexpr int kBytes = kTeamsOffset + V::kTeams * kTeamBytes;
    static_assert(kBytes <= kSharedLimit);
};

template <class V>
__device__ __forceinline__ void team_barrier(int team) {
    named_barrier<V::kTeamWarps * kLanes>(team + 1);
}

template <class Body, int... kIndex>
__device__ __forceinline__ void static_for_each(Body body, std::integer_sequence<int, kIndex...>) {
    (body(std::integral_constant<int, kIndex>{}), ...);
}

// Calls body(constant 0), ..., body(constant kCount - 1).
template <int kCount, class Body>
__device__ __forceinline__ void static_for(Body body) {
    static_for_each(body, std::make_integer_sequence<int, kCount>{});
}

// -- scores --------------------------------------------------------------------------------------------------------

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

// -- values --------------------------------------------------------------------------------------------------------

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

// -- one warp's attention ------------------------------------------------------------------------------------------

template <int kTiles, int kRowsPerLane>
__device__ __forceinline__ void rescale_output(const float (&rescale)[kRowsPerLane],
                                               float (&out)[kTiles][kRowsPerLane]) {
    bool changed = false;
#pragma unroll
    for (int h = 0; h < kRowsPerLane; ++h) changed = changed || rescale[h] != 1.0f;
    if (!__any_sync(kFullWarp, changed)) return;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int h = 0; h < kRowsPerLane; ++h) out[tile][h] *= rescale[h];
}

// A warp's share of a segment's coded blocks.
template <class V>
__device__ __forceinline__ void attend_coded(const DecodeParams& params, const TeamShared<V>& shared,
                                             typename V::Stream& stream, const Segment& segment, int warp_in_team,
                                             int lane, SoftmaxState<V::kRowsPerLane>& state,
                                             float (&out)[V::kChannelTiles][V::kRowsPerLane]) {
    using Unit = typename V::Unit;
    const Decoder decoder(params.negative_zero);
    QueryFragment<V> query;
    query.load(shared.query, lane);

    const Span& span = shared.span;
    const int begin = span.first_block + segment.begin, end = span.first_block + min(segment.end, span.coded_blocks);
    // Blocks [plain_begin, plain_end) need no mask: every row sees all of them, as codes, uncapped.
    int plain_begin = ceil_div(shared.row_begin[V::kRows - 1], kBlockTokens);
    int plain_end = shared.row_end[0] / kBlockTokens;
    if constexpr (V::kHasExact) {
        plain_begin = max(plain_begin, ceil_div(span.first_sink + span.sinks, kBlockUnits));
        plain_end = min(plain_end, span.first_recent / kBlockUnits);
    }
    if (params.soft_cap_log2 > 0.0f) plain_end = 0;

    for (int block = begin + warp_in_team; block < end; block += V::kTeamWarps) {
        const uint8_t* data = stream.wait();
        uint32_t key_scales[kBlockUnits], value_scales[kBlockUnits];
#pragma unroll
        for (int unit = 0; unit < kBlockUnits; ++unit) {
            const uint8_t* scales = data + unit * Unit::bytes + Unit::scale_offset + kScaleGroupBytes * (lane / 4);
            const uint2 both = *reinterpret_cast<const uint2*>(scales);
            key_scales[unit] = both.x, value_scales[unit] = both.y;
        }
        float scores[kBlockUnits][2][V::kRowsPerLane];
        score_block<V>(data, key_scales, query, decoder, lane, scores);
        // With the value words in registers the next block may come: the longer before it is needed, the better.
        ValueWords<V> words;
#pragma unroll
        for (int unit = 0; unit < kBlockUnits; ++unit)
            load_words(words[unit], data + unit * Unit::bytes + Unit::value_offset, lane);
        stream.release();
        if (block < plain_begin || block >= plain_end) edit_block<V>(params, shared, block, lane, scores, value_scales);

        float highest[V::kRowsPerLane], rescale[V::kRowsPerLane];
#pragma unroll
        for (int h = 0; h < V::kRowsPerLane; ++h) {
            highest[h] = kMasked;
#pragma unroll
            for (int unit = 0; unit < kBlockUnits; ++unit)
                highest[h] = fmaxf(highest[h], fmaxf(scores[unit][0][h], scores[unit][1][h]));
        }
        state.raise(highest, rescale);
#pragma unroll
        for (int unit = 0; unit < kBlockUnits; ++unit)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int h = 0; h < V::kRowsPerLane; ++h) {
                    scores[unit][half][h] = exp2_approx(scores[unit][half][h] - state.max[h]);
                    state.sum[h] += scores[unit][half][h];
                }
        rescale_output(rescale, out);
        static_for<Unit::Value::classes>(
            [&](auto cls) { accumulate_class<V, cls>(words, scores, value_scales, decoder, out); });
    }
}

// A warp's share of a segment's exact units; `out` is in the order of ExactRows::channel.
template <class V>
__device__ __forceinline__ void attend_exact(const DecodeParams& params, const TeamShared<V>& shared,
                                             typename V::Stream& stream, const Segment& segment, int warp_in_team,
                                             int lane, SoftmaxState<V::kRowsPerLane>& state,
                                             float (&out)[V::kChannelTiles][V::kRowsPerLane]) {
    const int g = lane / 4, c = lane % 4;
    const Span& span = shared.span;
    constexpr int kColumnTiles = column_tiles<V::kRows>();
    float sums[kColumnTiles][V::kHeadSize / 16][4] = {};
    for (int item = first_exact_item<V::kTeamWarps>(span, segment, warp_in_team); item < segment.end;
         item += V::kTeamWarps) {
        const uint8_t* data = stream.wait();
        const int index = item - span.coded_blocks;
        if (shared.exact.slots[index] < 0) {  // its codes counted
            stream.release();
            continue;
        }
        ExactRows<V::kHeadSize> keys, values;
        float scores[2][V::kRowsPerLane], rescale[V::kRowsPerLane], highest[V::kRowsPerLane];
        keys.load(data, lane);
        score_exact_unit<V::kRows, V::kHeadSize>(keys, shared.exact.query, lane, scores);
        values.load(data + V::Stream::kExactSideBytes, lane);  // not before: keys and values do not fit the registers
        stream.release();
        const int first_token = span.exact_unit(index) * kUnitTokens + g;
#pragma unroll
        for (int h = 0; h < V::kRowsPerLane; ++h) {
            const int row = V::kRowsPerLane * c + h;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int token = first_token + 8 * half;
                float score = fmaf(scores[half][h], params.scale_log2, -shared.query.mean_score[row]);
                if (params.soft_cap_log2 > 0.0f)
                    score = soft_capped(score, shared.query.mean_score[row], params.soft_cap_log2);
                const bool sees = token >= shared.row_begin[row] && token < shared.row_end[row];
                scores[half][h] = sees ? score : kMasked;
            }
            highest[h] = fmaxf(scores[0][h], scores[1][h]);
        }
        state.raise(highest, rescale);
#pragma unroll
        for (int h = 0; h < V::kRowsPerLane; ++h) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                scores[half][h] = exp2_approx(scores[half][h] - state.max[h]);
                state.sum[h] += scores[half][h];
            }
        }
        // The rest of the last unit may hold another request's values, NaNs among them: 0 * NaN must not count.
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (first_token + 8 * half >= shared.length)
#pragma unroll
                for (uint32_t& pair : values.row[half]) pair = 0;
        // A lane's two columns of a tile are high and low of its one row, or two of its rows.
#pragma unroll
        for (int columns = 0; columns < kColumnTiles; ++columns) {
            const float first = rescale[2 * columns], second = rescale[V::kRowsPerLane == 1 ? 0 : 2 * columns + 1];
#pragma unroll
            for (auto& tile : sums[columns]) tile[0] *= first, tile[1] *= second, tile[2] *= first, tile[3] *= second;
        }
        accumulate_exact_unit<V::kRows, V::kHeadSize>(values, scores, sums);
    }
#pragma unroll
    for (int tile = 0; tile < V::kChannelTiles; ++tile) {
        const int half = tile % 2;
        if constexpr (V::kRowsPerLane == 1) {
            out[tile][0] = sums[0][tile / 2][2 * half] + sums[0][tile / 2][2 * half + 1];
        } else {
#pragma unroll
            for (int h = 0; h < V::kRowsPerLane; ++h) out[tile][h] = sums[h / 2][tile / 2][2 * half + h % 2];
        }
    }
}

// -- merging -------------------------------------------------------------------------------------------------------

// A thread's share of a tile of rows by channels, not normalised, and the softmax state of its row.
template <class V>
struct Share {
    float value[V::kShare];
    float max;
    float sum;

    __device__ __forceinline__ Share() : max(kLowestMax), sum(0.0f) {
#pragma unroll
        for (float& x : value) x = 0.0f;
    }

    __device__ __forceinline__ void rescale(float new_max) {
        const float factor = exp2_approx(max - new_max);
        max = new_max;
        sum *= factor;
#pragma unroll
        for (float& x : value) x *= factor;
    }
};

// Where a thread's share lies.
template <class V>
struct ShareIndex {
    int warp_in_team;
    int lane;

    __device__ int thread() const { return warp_in_team * kLanes + lane; }
    __device__ int tile_row(int i) const { return warp_in_team + i * V::kTeamWarps; }  // channel tile * rows a lane
    __device__ bool exists(int i) const { return tile_row(i) < V::kChannelTiles * V::kRowsPerLane; }
    __device__ int offset(int i) const { return tile_row(i) * kLanes + lane; }
    // kTeamWarps is even, so all of a share belongs to one row.
    __device__ int row() const { return V::kRowsPerLane * (lane % 4) + warp_in_team % V::kRowsPerLane; }
    __device__ int channel_tile(int i) const { return tile_row(i) / V::kRowsPerLane; }
};

// The same values as one vector in memory.
template <class V>
struct alignas(V::kShare % 4 == 0 ? 16 : V::kShare % 2 == 0 ? 8 : 4) ShareVector {
    float value[V::kShare];

    // In L2: other SMs read it.
    __device__ __forceinline__ void store(float* to) const {
        if constexpr (V::kShare % 4 == 0) {
#pragma unroll
            for (int i = 0; i < V::kShare; i += 4)
                __stcg(reinterpret_cast<float4*>(to + i),
                       make_float4(value[i], value[i + 1], value[i + 2], value[i + 3]));
        } else if constexpr (V::kShare % 2 == 0) {
#pragma unroll
            for (int i = 0; i < V::kShare; i += 2)
                __stcg(reinterpret_cast<float2*>(to + i), make_float2(value[i], value[i + 1]));
        } else {
#pragma unroll
            for (int i = 0; i < V::kShare; ++i) __stcg(to + i, value[i]);
        }
    }

    __device__ __forceinline__ void load(const float* from) {
        if constexpr (V::kShare % 4 == 0) {
#pragma unroll
            for (int i = 0; i < V::kShare; i += 4) {
                const float4 four = __ldcg(reinterpret_cast<const float4*>(from + i));
                value[i] = four.x, value[i + 1] = four.y, value[i + 2] = four.z, value[i + 3] = four.w;
            }
        } else if constexpr (V::kShare % 2 == 0) {
#pragma unroll
            for (int i = 0; i < V::kShare; i += 2) {
                const float2 two = __ldcg(reinterpret_cast<const float2*>(from + i));
                value[i] = two.x, value[i + 1] = two.y;
            }
        } else {
#pragma unroll
            for (int i = 0; i < V::kShare; ++i) value[i] = __ldcg(from + i);
        }
    }
};

// Leaves a warp's result for the team.
template <class V>
__device__ __forceinline__ void store_fragment(Fragments<V>& fragments, int warp_in_team, int lane,
                                               SoftmaxState<V::kRowsPerLane>& state,
                                               const float (&out)[V::kChannelTiles][V::kRowsPerLane]) {
#pragma unroll
    for (int h = 0; h < V::kRowsPerLane; ++h) {
#pragma unroll
        for (int step = 4; step < kLanes; step *= 2) state.sum[h] += __shfl_xor_sync(kFullWarp, state.sum[h], step);
        if (lane < 4)
            fragments.state[warp_in_team][V::kRowsPerLane * lane + h] = make_float2(state.max[h], state.sum[h]);
    }
    float* own = fragments.tile + warp_in_team * V::kTileFloats;
#pragma unroll
    for (int tile = 0; tile < V::kChannelTiles; ++tile)
#pragma unroll
        for (int h = 0; h < V::kRowsPerLane; ++h) own[(tile * V::kRowsPerLane + h) * kLanes + lane] = out[tile][h];
}

// Merges the results of a team's warps; a team barrier lies between the stores and this.
template <class V>
__device__ __forceinline__ Share<V> merge_fragments(const Fragments<V>& fragments, const ShareIndex<V>& index) {
    Share<V> share;
#pragma unroll
    for (int warp = 0; warp < V::kTeamWarps; ++warp) share.max = fmaxf(share.max, fragments.state[warp][index.row()].x);
#pragma unroll
    for (int warp = 0; warp < V::kTeamWarps; ++warp) {
        const float2 part = fragments.state[warp][index.row()];
        const float factor = exp2_approx(part.x - share.max);
        share.sum = fmaf(factor, part.y, share.sum);
#pragma unroll
        for (int i = 0; i < V::kShare; ++i)
            if (index.exists(i))
                share.value[i] = fmaf(factor, fragments.tile[warp * V::kTileFloats + index.offset(i)], share.value[i]);
    }
    return share;
}

// A partial result in global memory: each thread's share, normalised, and log2(sum) + max of each row: one number a row
// and part to read, and all the parts of a pair at once.
template <class V>
__device__ __forceinline__ void store_partial(const DecodeParams& params, const ShareIndex<V>& index, int slot,
                                              const Share<V>& share) {
    const float norm = share.sum == 0.0f ? 0.0f : 1.0f / share.sum;
    const float weight = share.sum == 0.0f ? kLowestMax : share.max + log2f(share.sum);
    ShareVector<V> vector;
#pragma unroll
    for (int i = 0; i < V::kShare; ++i) vector.value[i] = share.value[i] * norm;
    vector.store(params.partial_tiles + static_cast<int64_t>(slot) * V::kPartialFloats + index.thread() * V::kShare);
    if (index.warp_in_team < V::kRowsPerLane && index.lane < 4)
        __stcg(params.partial_weights + slot * V::kRows + index.row(), weight);
}

// A thread's share of up to kAtOnce partial results in consecutive slots: all on their way, then merged.
template <class V, int kAtOnce>
struct Partials {
    float weight[kAtOnce];
    ShareVector<V> share[kAtOnce];

    __device__ __forceinline__ void load(const DecodeParams& params, const ShareIndex<V>& index, int first_slot,
                                         int count) {
        const float* tiles =
            params.partial_tiles + static_cast<int64_t>(first_slot) * V::kPartialFloats + index.thread() * V::kShare;
        const float* weights = params.partial_weights + first_slot * V::kRows + index.row();
#pragma unroll
        for (int part = 0; part < kAtOnce; ++part) {
            weight[part] = kLowestMax;
            share[part] = {};
            if (part >= count) continue;
            weight[part] = __ldcg(weights + part * V::kRows);
            share[part].load(tiles + part * V::kPartialFloats);
        }
    }

    __device__ __forceinline__ void merge_into(Share<V>& merged) const {
        float highest = merged.max;
#pragma unroll
        for (int part = 0; part < kAtOnce; ++part) highest = fmaxf(highest, weight[part]);
        merged.rescale(highest);
#pragma unroll
        for (int part = 0; part < kAtOnce; ++part) {
            // Nothing seen (or no part): a row that saw nothing at all must keep a sum of 0.
            const float factor = weight[part] == kLowestMax ? 0.0f : exp2_approx(weight[part] - highest);
            merged.sum += factor;
#pragma unroll
            for (int i = 0; i < V::kShare; ++i)
                merged.value[i] = fmaf(factor, share[part].value[i], merged.value[i]);
        }
    }
};

// Merges `count` partial results that lie in consecutive slots.
template <class V>
__device__ __forceinline__ void merge_partials(const DecodeParams& params, const ShareIndex<V>& index, int first_slot,
                                               int count, Share<V>& share) {
    constexpr int kFloats = 32;  // in flight, as far as registers last
    constexpr int kAtOnce = kFloats / V::kShare < 32 ? kFloats / V::kShare : 32;
    for (int first = 0; first < count; first += kAtOnce) {
        Partials<V, kAtOnce> partials;
        partials.load(params, index, first_slot + first, count - first);
        partials.merge_into(share);
    }
}

// Normalises a pair's rows, brings them back to the model's space and writes them. Collective over the team.
template <class V>
__device__ __forceinline__ void finish_pair(const DecodeParams& params, TeamShared<V>& shared,
                                            const ShareIndex<V>& index, int team, const Segment& segment,
                                            const TransformRow<typename V::Unit::Value>& transform, Share<V>& coded,
                                            Share<V>& exact) {
    const int lane = index.lane, row = index.row();
    float highest = fmaxf(coded.max, exact.max), sink = 0.0f;
    if (params.sink_logits != nullptr) {
        constexpr float kLog2E = 1.442695041f;
        const RowPlace place = row_place<V::kRows>(params, segment, shared.queries.count, row);
        const float logit = place.valid ? __ldg(params.sink_logits + place.head) * kLog2E : 0.0f;
        // Scores lack the key mean's share unless the soft cap put it back.
        sink = params.soft_cap_log2 > 0.0f ? logit : logit - shared.query.mean_score[row];
        highest = fmaxf(highest, sink);
        sink = exp2_approx(sink - highest);
    }
    coded.rescale(highest);
    exact.rescale(highest);
    const float total = coded.sum + exact.sum + sink;
    const float norm = total == 0.0f ? 0.0f : 1.0f / total;  // 0: a padded request of length 0

    team_barrier<V>(team);  // all have read the fragments
    float* coded_tile = shared.coded.tile;
    float* exact_tile = coded_tile + V::kRows * V::kOutStride;
#pragma unroll
    for (int i = 0; i < V::kShare; ++i) {
        if (!index.exists(i)) continue;
        const int tile = index.channel_tile(i), g = lane / 4;
        coded_tile[row * V::kOutStride + 8 * tile + g] = coded.value[i] * norm;
        if constexpr (V::kHasExact)
            exact_tile[row * V::kOutStride + ExactRows<V::kHeadSize>::channel(tile, g)] = exact.value[i] * norm;
    }
    team_barrier<V>(team);

    for (int out_row = index.warp_in_team; out_row < V::kRows; out_row += V::kTeamWarps) {
        const RowPlace place = row_place<V::kRows>(params, segment, shared.queries.count, out_row);
        if (!place.valid) continue;
        const int64_t token = shared.queries.first + place.token;
        const float* coded_row = coded_tile + out_row * V::kOutStride;
        const float* exact_row = V::kHasExact ? exact_tile + out_row * V::kOutStride : nullptr;
        if (params.coded_out != nullptr) {
            const int64_t first = (token * params.kv_heads * params.group + place.head) * V::kHeadSize;
            for (int channel = lane; channel < V::kHeadSize; channel += kLanes) {
                params.coded_out[first + channel] = coded_row[channel];
                if (V::kHasExact) params.exact_out[first + channel] = exact_row[channel];
            }
        } else {
            const int64_t first = token * params.out_token_stride + place.head * params.out_head_stride;
            finish_class<typename V::Unit, 0>(params, transform, coded_row, exact_row, first, lane);
            if constexpr (V::Unit::Value::classes == 2)
                finish_class<typename V::Unit, 1>(params, transform, coded_row, exact_row, first, lane);
        }
    }
}

// Tells whether all teams that share the pair have stored their parts; true for one team only. Collective over the
// team: the barriers order its stores before one thread's release, and its loads after that thread's acquire.
template <class V>
__device__ __forceinline__ bool arrive_last(const DecodeParams& params, TeamShared<V>& shared, int team, int thread,
                                            int pair_index, int parts) {
    team_barrier<V>(team);
    if (thread == 0) {
        const int arrived = atomic_add_acq_rel(params.arrivals + pair_index, 1);
        shared.is_last = arrived == parts - 1;
        if (shared.is_last) params.arrivals[pair_index] = 0;  // ready for the next launch
    }
    team_barrier<V>(team);
    return shared.is_last;
}

// -- the kernel ----------------------------------------------------------------------------------------------------

// What a segment needs before its blocks, on its way: begun before the work in front of it ends, finished after.
template <class V>
class SegmentPrologue {
  public:
    __device__ __forceinline__ void locate(const DecodeParams& params, const Segment& segment, int warp_in_team) {
        queries_ = query_range(params, segment.request);
#pragma unroll
        for (int i = 0; i < kRowsPerWarp; ++i)
            query_[i].template locate<V::kRows>(params, segment, queries_, row(i, warp_in_team));
    }

    __device__ __forceinline__ void load_queries(const DecodeParams& params, int lane) {
#pragma unroll
        for (int i = 0; i < kRowsPerWarp; ++i) query_[i].load(params, lane);
    }

    // The length, and what the step's tables and the model's constants say.
    __device__ __forceinline__ void load_constants(const DecodeParams& params, const Segment& segment, int warp_in_team,
                                                   int lane) {
        length_ = __ldg(params.seq_lens + segment.request);
        span_ = request_span<V::kHasExact>(params, segment.request);
        transform_.load(params.key_inverse, segment.head, lane);
        if constexpr (V::kHasExact) {
#pragma unroll
            for (int i = 0; i < kSlotsPerThread; ++i) {
                const int exact = warp_in_team * kLanes + lane + i * V::kTeamWarps * kLanes;
                slot_[i] =
                    exact < span_.exact_units() ? exact_slot(params, segment.request, span_.exact_unit(exact)) : -1;
            }
        }
        if (needs_mean_score<V::kHasExact>(params)) {
            const float* mean = params.key_mean + segment.head * V::kHeadSize + lane;
#pragma unroll
            for (int i = 0; i < Query::kSlots; ++i)
                mean_[i] = 32 * i + lane < V::kHeadSize ? __ldg(mean + 32 * i) : 0.0f;
        }
    }

    // Writes what the team shares; a team barrier must follow.
    __device__ __forceinline__ void finish(const DecodeParams& params, TeamShared<V>& shared, const Segment& segment,
                                           int warp_in_team, int lane) {
        const int thread = warp_in_team * kLanes + lane;
        if (thread == 0) shared.length = length_, shared.queries = queries_, shared.span = span_;
        if (thread < V::kRows) {
            // Rows ascend by token; those past the last see what the last token sees.
            const int queries = queries_.count;
            const int token = min(row_place<V::kRows>(params, segment, queries, thread).token, queries - 1);
            const int end = length_ - queries + token + 1;
            shared.row_end[thread] = end;
            shared.row_begin[thread] = params.window > 0 ? max(0, end - params.window) : 0;
        }
        ExactQueryTile<V::kRows, V::kHeadSize>* exact_query = nullptr;
        if constexpr (V::kHasExact) {
            exact_query = &shared.exact.query;
#pragma unroll
            for (int i = 0; i < kSlotsPerThread; ++i) {
                const int exact = thread + i * V::kTeamWarps * kLanes;
                if (exact < kMaxExactUnits) shared.exact.slots[exact] = slot_[i];
            }
        }
#pragma unroll
        for (int i = 0; i < kRowsPerWarp; ++i)
            if (const int own = row(i, warp_in_team); own < V::kRows)
                prepare_row<typename V::Unit, V::kHasExact>(params, query_[i], transform_, mean_, own,
                                                            shared.coded.tile + own * V::kHeadSize, shared.query,
                                                            exact_query, lane);
    }

  private:
    static constexpr int kRowsPerWarp = ceil_div(V::kRows, V::kTeamWarps);
    __device__ static int row(int i, int warp_in_team) { return warp_in_team + i * V::kTeamWarps; }

    using Query = QueryRow<V::kHeadSize>;
    static constexpr int kSlotsPerThread = ceil_div(kMaxExactUnits, V::kTeamWarps * kLanes);

    QueryRange queries_ = {};
    int length_ = 0;
    Span span_ = {};
    TransformRow<typename V::Unit::Key> transform_ = {};
    float mean_[Query::kSlots] = {};
    Query query_[kRowsPerWarp] = {};
    int slot_[kSlotsPerThread] = {};  // of exact units thread, thread + team size, ...
};

template <class V>
__global__ void __launch_bounds__(V::kThreads, 1) decode_attention_kernel(const __grid_constant__ DecodeParams params) {
    extern __shared__ __align__(128) uint8_t shared_bytes[];
    using Layout = SharedLayout<V>;
    allow_next_kernel();
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const int team_in_cta = warp / V::kTeamWarps, warp_in_team = warp % V::kTeamWarps;
    const int team = blockIdx.x * V::kTeams + team_in_cta, teams = gridDim.x * V::kTeams;
    uint8_t* team_bytes = shared_bytes + Layout::kTeamsOffset + team_in_cta * Layout::kTeamBytes;
    auto& shared = *reinterpret_cast<TeamShared<V>*>(team_bytes);
    const ShareIndex<V> index{warp_in_team, lane};

    Work<V::kHasExact> work(params, team, teams, V::kTeamWarps);
    typename V::Stream stream(params, work, warp_in_team, shared_bytes + warp * V::Stream::kRingBytes,
                              reinterpret_cast<typename V::Stream::Shared*>(shared_bytes + Layout::kStreams)[warp]);
    if (index.thread() == 0) shared.work = work;
    {
        SegmentPrologue<V> prologue;
        prologue.locate(params, work.segment, warp_in_team);
        prologue.load_constants(params, work.segment, warp_in_team, lane);
        // So far only tables and the model's constants were read; the kernel in front may still be writing the rest.
        await_previous_kernel();
        if (work.done()) return;
        prologue.load_queries(params, lane);  // before the flood of copies, which they would have to queue behind
        stream.fill();
        prologue.finish(params, shared, work.segment, warp_in_team, lane);
    }

    while (true) {
        team_barrier<V>(team_in_cta);
        {
            SoftmaxState<V::kRowsPerLane> state;
            float out[V::kChannelTiles][V::kRowsPerLane] = {};
            attend_coded<V>(params, shared, stream, shared.work.segment, warp_in_team, lane, state, out);
            store_fragment<V>(shared.coded, warp_in_team, lane, state, out);
        }
        // Read again, not kept in registers while blocks were read.
        work = shared.work;
        const Segment segment = work.segment;
        const Span span = shared.span;
        const bool has_exact = V::kHasExact && segment.end > span.coded_blocks;
        if constexpr (V::kHasExact) {
            if (has_exact) {
                SoftmaxState<V::kRowsPerLane> state;
                float out[V::kChannelTiles][V::kRowsPerLane];
                attend_exact<V>(params, shared, stream, segment, warp_in_team, lane, state, out);
                store_fragment<V>(shared.exact.fragments, warp_in_team, lane, state, out);
            }
        }

        team_barrier<V>(team_in_cta);
        Share<V> coded = merge_fragments<V>(shared.coded, index), exact;
        if constexpr (V::kHasExact)
            if (has_exact) exact = merge_fragments<V>(shared.exact.fragments, index);

        const Split split = split_of(params, segment, span.items(), work.stretch, team);
        bool last = true;
        if (split.parts > 1) {
            // Coded blocks come first: parts [0, coded_parts) have some, parts [first_exact, parts) have exact units.
            const int coded_parts = split.part_of(span.coded_blocks - 1, work.stretch) + 1;
            if (segment.begin < span.coded_blocks) store_partial<V>(params, index, split.slot, coded);
            // Exact parts lie behind the coded ones.
            const int exact_slots = params.requests * params.kv_heads * params.row_tiles + teams;
            if constexpr (V::kHasExact)
                if (has_exact) store_partial<V>(params, index, exact_slots + split.slot, exact);
            const int pair = pair_index(params, segment);
            last = arrive_last<V>(params, shared, team_in_cta, index.thread(), pair, split.parts);
            if (last) {
                coded = {}, exact = {};
                const int first_exact = split.part_of(span.coded_blocks, work.stretch);
                const int exact_parts = V::kHasExact && span.exact_units() > 0 ? split.parts - first_exact : 0;
                const int exact_from = exact_slots + split.first_slot + first_exact;
                Partials<V, 1> one_exact;  // mostly all there is: on its way while the coded parts are merged
                if constexpr (V::kHasExact) one_exact.load(params, index, exact_from, exact_parts);
                merge_partials<V>(params, index, split.first_slot, coded_parts, coded);
                if constexpr (V::kHasExact) {
                    one_exact.merge_into(exact);
                    merge_partials<V>(params, index, exact_from + 1, exact_parts - 1, exact);
                }
            }
        }

        // What the next segment needs is on its way while this one is finished.
        TransformRow<typename V::Unit::Value> transform;
        transform.load(params.value_inverse, segment.head, lane);
        work.next(params);
        SegmentPrologue<V> prologue;
        if (!work.done()) {
            prologue.locate(params, work.segment, warp_in_team);
            prologue.load_queries(params, lane);
            prologue.load_constants(params, work.segment, warp_in_team, lane);
        }
        if (last) finish_pair<V>(params, shared, index, team_in_cta, segment, transform, coded, exact);
        if (work.done()) return;
        team_barrier<V>(team_in_cta);  // all are done with what the team shares
        prologue.finish(params, shared, work.segment, warp_in_team, lane);
        if (index.thread() == 0) shared.work = work;
    }
}

}  // namespace mq
