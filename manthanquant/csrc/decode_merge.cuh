// Merging partial attention by the rule of online softmax: the warps of a team in shared memory, the teams that share a
// pair in global memory, and last the coded and the exact part. Whoever merges last writes the output.
#pragma once

#include "decode_exact.cuh"
#include "decode_query.cuh"
#include "decode_variant.cuh"

namespace mq {

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

template <class V>
__device__ __forceinline__ ShareIndex<V> share_index(unsigned thread) {
    return {static_cast<int>(thread / kLanes % V::kTeamWarps), static_cast<int>(thread % kLanes)};
}

// threadIdx.x, which the compiler does not know for the same: what follows from it is computed again where it is needed
// next, and not kept in registers, of which there are none left, while blocks are read.
__device__ __forceinline__ unsigned thread_again() {
    unsigned thread = threadIdx.x;
    asm volatile("" : "+r"(thread));
    return thread;
}

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

// Normalises a pair's rows; `dense`: for a product with a matrix. A barrier must follow. Collective over the team.
template <class V>
__device__ __forceinline__ void normalise_rows(const DecodeParams& params, TeamShared<V>& shared,
                                               const ShareIndex<V>& index, int team, const Segment& segment, bool dense,
                                               Share<V>& coded, Share<V>& exact) {
    const int row = index.row();
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
    RowBuffers<V>& rows = shared.rows;
#pragma unroll
    for (int i = 0; i < V::kShare; ++i) {
        if (!index.exists(i)) continue;
        const int tile = index.channel_tile(i), g = index.lane / 4;
        const float value = coded.value[i] * norm;
        if constexpr (V::kDense)
            if (dense) rows.split.store(row, 8 * tile + g, value);
        if (!dense) rows.row[row][8 * tile + g] = value;
        if constexpr (V::kHasExact)
            rows.exact[row][ExactRows<V::kHeadSize>::channel(tile, g)] = exact.value[i] * norm;
    }
}

// Calls body(row, element) for each of a warp's rows; `element`: of the output, where the row begins.
template <class V, class Body>
__device__ __forceinline__ void for_each_output_row(const DecodeParams& params, const TeamShared<V>& shared,
                                                    const ShareIndex<V>& index, const Segment& segment, Body body) {
    for (int row = index.warp_in_team; row < V::kRows; row += V::kTeamWarps) {
        const RowPlace place = row_place<V::kRows>(params, segment, shared.queries.count, row);
        if (!place.valid) continue;
        const int64_t token = shared.queries.first + place.token;
        body(row, token * params.out_token_stride + place.head * params.out_head_stride);
    }
}

// Brings a pair's rows back to the model's space by a structured transform and writes them. Collective over the team.
template <class V>
__device__ __forceinline__ void write_structured(const DecodeParams& params, const TeamShared<V>& shared,
                                                 const ShareIndex<V>& index, const Segment& segment,
                                                 const TransformRow<typename V::Unit::Value>& transform) {
    for_each_output_row<V>(params, shared, index, segment, [&](int row, int64_t first) {
        const float *coded = shared.rows.row[row], *exact = V::kHasExact ? shared.rows.exact[row] : nullptr;
        finish_class<typename V::Unit, 0>(params, transform, coded, exact, first, index.lane);
        if constexpr (V::Unit::Value::classes == 2)
            finish_class<typename V::Unit, 1>(params, transform, coded, exact, first, index.lane);
    });
}

// Writes a pair's rows that were multiplied by a dense matrix. Collective over the team.
template <class V>
__device__ __forceinline__ void write_products(const DecodeParams& params, const TeamShared<V>& shared,
                                               const ShareIndex<V>& index, const Segment& segment) {
    for_each_output_row<V>(params, shared, index, segment, [&](int row, int64_t first) {
        for (int channel = index.lane; channel < V::kHeadSize; channel += kLanes) {
            float value = shared.rows.product(row, channel);
            if constexpr (V::kHasExact) value += shared.rows.exact[row][channel];
            store_element(params.out, first + channel, params.out_dtype, value);
        }
    });
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

}  // namespace mq
