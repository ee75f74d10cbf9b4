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
//
// Below: a warp's loop over its blocks, and the kernel. A block's scores are in decode_scores.cuh, its values in
// decode_values.cuh, merging in decode_merge.cuh, products with dense matrices in decode_dense.cuh; decode_plan.cuh
// deals out the work, decode_stream.cuh copies blocks.
#pragma once

#include "decode_dense.cuh"
#include "decode_exact.cuh"
#include "decode_merge.cuh"
#include "decode_plan.cuh"
#include "decode_query.cuh"
#include "decode_scores.cuh"
#include "decode_stream.cuh"
#include "decode_values.cuh"
#include "decode_variant.cuh"

namespace mq {

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

    // Leaves the queries where a dense matrix multiplies them; a barrier must follow.
    __device__ __forceinline__ void place_queries(const DecodeParams& params, TeamShared<V>& shared, int warp_in_team,
                                                  int lane) {
        for_each_element(warp_in_team, lane, [&](const Query& query, int row, int slot, int channel) {
            shared.rows.split.store(row, channel, to_float(query.raw[slot], params.query_dtype));
        });
    }

    // Writes what the team shares; a team barrier must follow. With a dense matrix: after the product.
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
        SplitRows<V::kRows, V::kHeadSize>* exact_query = nullptr;
        if constexpr (V::kHasExact) {
            exact_query = &shared.exact.query;
#pragma unroll
            for (int i = 0; i < kSlotsPerThread; ++i) {
                const int exact = thread + i * V::kTeamWarps * kLanes;
                if (exact < kMaxExactUnits) shared.exact.slots[exact] = slot_[i];
            }
        }
        const bool dense = V::kDense && params.key_matrix.fragments != nullptr;
        if constexpr (V::kDense) {
            if (dense)
                for_each_element(warp_in_team, lane, [&](const Query&, int row, int, int channel) {
                    shared.rows.row[row][channel] = shared.rows.product(row, channel);
                });
        }
#pragma unroll
        for (int i = 0; i < kRowsPerWarp; ++i)
            if (const int own = row(i, warp_in_team); own < V::kRows)
                prepare_row<typename V::Unit, V::kHasExact>(params, query_[i], transform_, mean_, own,
                                                            shared.rows.row[own], shared.query, exact_query, dense,
                                                            lane);
    }

  private:
    static constexpr int kRowsPerWarp = ceil_div(V::kRows, V::kTeamWarps);
    __device__ static int row(int i, int warp_in_team) { return warp_in_team + i * V::kTeamWarps; }

    using Query = QueryRow<V::kHeadSize>;
    static constexpr int kSlotsPerThread = ceil_div(kMaxExactUnits, V::kTeamWarps * kLanes);

    // Calls body(query, row, slot, channel) for each element of this lane's queries.
    template <class Body>
    __device__ __forceinline__ void for_each_element(int warp_in_team, int lane, Body body) {
#pragma unroll
        for (int i = 0; i < kRowsPerWarp; ++i)
            if (const int own = row(i, warp_in_team); own < V::kRows)
#pragma unroll
                for (int slot = 0; slot < Query::kSlots; ++slot)
                    if (const int channel = 32 * slot + lane; channel < V::kHeadSize)
                        body(query_[i], own, slot, channel);
    }

    QueryRange queries_ = {};
    int length_ = 0;
    Span span_ = {};
    TransformRow<typename V::Unit::Key> transform_ = {};
    float mean_[Query::kSlots] = {};
    Query query_[kRowsPerWarp] = {};
    int slot_[kSlotsPerThread] = {};  // of exact units thread, thread + team size, ...
};

// Multiplies the rows of a team by a dense matrix. Collective over the team.
template <class V>
__device__ __forceinline__ void multiply_rows(const DenseTransform& transform, TeamShared<V>& shared,
                                              const ShareIndex<V>& index, int team, int kv_head) {
    DenseProduct<V, V::kTeamWarps> product;
    product.begin(transform, kv_head, index.warp_in_team, index.lane);
    if (index.thread() == 0) shared.dense_head = kv_head;
    team_barrier<V>(team);
    product.template multiply<1>(transform, &shared, index.warp_in_team, index.lane);
    team_barrier<V>(team);
}

// Multiplies the rows of all teams of a CTA by dense matrices, of KV head `kv_head` those of this team, or none: -1.
// Collective over the CTA; `product` may have begun.
template <class V>
__device__ __forceinline__ void multiply_all_rows(const DenseTransform& transform, TeamShared<V>* teams,
                                                  TeamShared<V>& shared, const ShareIndex<V>& index, int team,
                                                  int kv_head, DenseProduct<V, V::kWarps>& product) {
    if (index.thread() == 0) shared.dense_head = kv_head;
    cta_barrier<V>(team);
    product.template multiply<V::kTeams>(transform, teams, team * V::kTeamWarps + index.warp_in_team, index.lane);
    cta_barrier<V>(team);
}

template <class V>
__global__ void __launch_bounds__(V::kThreads, 1) decode_attention_kernel(const __grid_constant__ DecodeParams params) {
    extern __shared__ __align__(128) uint8_t shared_bytes[];
    using Layout = SharedLayout<V>;
    allow_next_kernel();
    const int warp = threadIdx.x / kLanes, team_in_cta = warp / V::kTeamWarps;
    ShareIndex<V> index = share_index<V>(threadIdx.x);
    const int team = blockIdx.x * V::kTeams + team_in_cta, teams = gridDim.x * V::kTeams;
    uint8_t* team_bytes = shared_bytes + Layout::kTeamsOffset + team_in_cta * Layout::kTeamBytes;
    auto& shared = *reinterpret_cast<TeamShared<V>*>(team_bytes);

    Work<V::kHasExact> work(params, team, teams, V::kTeamWarps);
    typename V::Stream stream(params, work, index.warp_in_team, shared_bytes + warp * V::Stream::kRingBytes,
                              reinterpret_cast<typename V::Stream::Shared*>(shared_bytes + Layout::kStreams)[warp]);
    auto* const teams_shared = reinterpret_cast<TeamShared<V>*>(shared_bytes + Layout::kTeamsOffset);
    if (index.thread() == 0) shared.work = work;
    {
        SegmentPrologue<V> prologue;
        DenseProduct<V, V::kWarps> product;
        // Not with the exact tier: for that there are too few registers.
        if constexpr (V::kDense && !V::kHasExact) product.begin(params.key_matrix, work.segment.head, warp, index.lane);
        prologue.locate(params, work.segment, index.warp_in_team);
        prologue.load_constants(params, work.segment, index.warp_in_team, index.lane);
        // So far only tables and the model's constants were read; the kernel in front may still be writing the rest.
        await_previous_kernel();
        // With dense products a team without work goes along, with the first request's queries: the others need it at
        // the CTA's barriers, and a branch here would hold up the loads.
        if constexpr (!V::kDense)
            if (work.done()) return;
        prologue.load_queries(params, index.lane);  // before the flood of copies, which they would have to queue behind
        stream.fill();
        const bool dense_keys = V::kDense && params.key_matrix.fragments != nullptr;
        if constexpr (V::kDense)
            if (dense_keys) prologue.place_queries(params, shared, index.warp_in_team, index.lane);
        stream.prefetch();  // not sooner: it waits for a page id
        if constexpr (V::kDense) {
            if (dense_keys)
                multiply_all_rows<V>(params.key_matrix, teams_shared, shared, index, team_in_cta,
                                     work.done() ? -1 : work.segment.head, product);
        }
        prologue.finish(params, shared, work.segment, index.warp_in_team, index.lane);
    }

    const bool dense_values = V::kDense && params.value_matrix.fragments != nullptr;
    bool has_rows = false;  // the team's last ones, for all warps of the CTA to multiply
    while (!work.done()) {
        team_barrier<V>(team_in_cta);
        {
            SoftmaxState<V::kRowsPerLane> state;
            float out[V::kChannelTiles][V::kRowsPerLane] = {};
            attend_coded<V>(params, shared, stream, shared.work.segment, index.warp_in_team, index.lane, state, out);
            store_fragment<V>(shared.coded, index.warp_in_team, index.lane, state, out);
        }
        // Read again, not kept in registers while blocks were read.
        work = shared.work;
        if constexpr (V::kDense) index = share_index<V>(thread_again());
        const Segment segment = work.segment;
        const Span span = shared.span;
        const bool has_exact = V::kHasExact && segment.end > span.coded_blocks;
        if constexpr (V::kHasExact) {
            if (has_exact) {
                SoftmaxState<V::kRowsPerLane> state;
                float out[V::kChannelTiles][V::kRowsPerLane];
                attend_exact<V>(params, shared, stream, segment, index.warp_in_team, index.lane, state, out);
                store_fragment<V>(shared.exact.fragments, index.warp_in_team, index.lane, state, out);
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
        transform.load(params.value_inverse, segment.head, index.lane);
        work.next(params);
        if constexpr (V::kDense) {
            if (last && dense_values) {
                normalise_rows<V>(params, shared, index, team_in_cta, segment, true, coded, exact);
                if (work.done()) {
                    has_rows = true;
                    break;
                }
                multiply_rows<V>(params.value_matrix, shared, index, team_in_cta, segment.head);
                write_products<V>(params, shared, index, segment);
            }
        }
        SegmentPrologue<V> prologue;
        if (!work.done()) {
            prologue.locate(params, work.segment, index.warp_in_team);
            prologue.load_queries(params, index.lane);
            prologue.load_constants(params, work.segment, index.warp_in_team, index.lane);
        }
        if (last && !dense_values) {
            normalise_rows<V>(params, shared, index, team_in_cta, segment, false, coded, exact);
            team_barrier<V>(team_in_cta);
            write_structured<V>(params, shared, index, segment, transform);
        }
        if (work.done()) break;
        team_barrier<V>(team_in_cta);  // all are done with what the team shares
        if constexpr (V::kDense) {
            if (params.key_matrix.fragments != nullptr) {
                prologue.place_queries(params, shared, index.warp_in_team, index.lane);
                multiply_rows<V>(params.key_matrix, shared, index, team_in_cta, work.segment.head);
            }
        }
        prologue.finish(params, shared, work.segment, index.warp_in_team, index.lane);
        if (index.thread() == 0) shared.work = work;
    }
    if constexpr (V::kDense) {
        if (!dense_values) return;
        DenseProduct<V, V::kWarps> product;
        const Segment segment = work.segment;
        product.begin(params.value_matrix, segment.head, warp, index.lane);  // teams mostly meet one KV head
        multiply_all_rows<V>(params.value_matrix, teams_shared, shared, index, team_in_cta,
                             has_rows ? segment.head : -1, product);
        if (has_rows) write_products<V>(params, shared, index, segment);
    }
}

}  // namespace mq
