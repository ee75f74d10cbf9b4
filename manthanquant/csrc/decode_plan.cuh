// Who works on what. The blocks of all (KV head, request, row tile) pairs form one list; each team of warps takes an
// equal stretch of it. Nothing is stored: every warp finds its stretch from the sequence lengths alone, so a captured
// graph is balanced at whatever lengths it is replayed with.
//
// The items of a pair are its blocks of 64 coded tokens, then its exact units (one unit of bf16 moves about as many
// bytes as a block of codes). A stretch cuts at most two pairs in the middle; their parts are merged at the end.
#pragma once

#include "decode_params.h"
#include "layout.h"
#include "ptx.cuh"

namespace mq {

constexpr int kBlockUnits = 4;  // a block, 64 tokens: what a warp copies and multiplies at a time
constexpr int kBlockTokens = kBlockUnits * kUnitTokens;

constexpr int kAlignmentSlack = 16;  // a stretch may grow by a 16th of it so that it ends where a pair does

MQ_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
MQ_HOST_DEVICE constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

// unit / page_units by a multiplication: exact for units below 2^31 / page_units^2, far above any sequence.
__device__ __forceinline__ int page_of_unit(const DecodeParams& params, int unit) {
    return static_cast<int>(__umulhi(static_cast<uint32_t>(2 * unit), params.page_magic));
}

// Where a request's exact copy of a unit is: its slot, or -1.
__device__ __forceinline__ int exact_slot(const DecodeParams& params, int request, int unit) {
    const int index = page_of_unit(params, unit);
    const int page = __ldg(params.block_table + request * params.table_stride + index);
    return __ldg(params.hot_slot + static_cast<int64_t>(page) * params.page_units + unit - index * params.page_units);
}

// A request's new tokens.
struct QueryRange {
    int first;
    int count;
};

__device__ __forceinline__ QueryRange query_range(const DecodeParams& params, int request) {
    if (params.query_start_loc == nullptr) return {request * params.query_tokens, params.query_tokens};
    const int first = __ldg(params.query_start_loc + request);
    return {first, min(__ldg(params.query_start_loc + request + 1) - first, params.query_tokens)};
}

// What a launch reads of one request.
struct Span {
    int row_tiles;     // a KV head; 0 for a request without new tokens
    int units;         // that hold tokens
    int first_block;   // blocks before it are outside every row's window
    int coded_blocks;  // at least one, so that an empty request still writes its (zero) output
    int first_sink;    // exact units are [first_sink, first_sink + sinks) and [first_recent, units)
    int sinks;
    int first_recent;

    __device__ int exact_units() const { return sinks + units - first_recent; }
    __device__ int items() const { return coded_blocks + exact_units(); }
    __device__ int exact_unit(int index) const {
        return index < sinks ? first_sink + index : first_recent + index - sinks;
    }
    // The index of a unit among the exact ones, or -1.
    __device__ int exact_index(int unit) const {
        if (unit >= first_sink && unit < first_sink + sinks) return unit - first_sink;
        return unit >= first_recent && unit < units ? sinks + unit - first_recent : -1;
    }
};

template <bool kHasExact>
__device__ __forceinline__ Span request_span(const DecodeParams& params, int request) {
    const int length = __ldg(params.seq_lens + request), queries = query_range(params, request).count;
    // The first query token sees the oldest keys.
    const int oldest = params.window > 0 ? max(0, length - queries + 1 - params.window) : 0;
    Span span;
    span.row_tiles =
        queries == params.query_tokens ? params.row_tiles : ceil_div(queries * params.group, params.tile_rows);
    span.units = ceil_div(length, kUnitTokens);
    span.first_block = oldest / kBlockTokens;
    span.coded_blocks = max(1, ceil_div(length, kBlockTokens) - span.first_block);
    span.first_sink = 0, span.sinks = 0, span.first_recent = span.units;
    if constexpr (kHasExact) {
        const int visible = oldest / kUnitTokens, sink_end = min(params.sink_units, span.units);
        span.first_sink = visible;
        span.sinks = max(0, sink_end - visible);
        if (params.recent_tokens > 0)
            span.first_recent = max(max(0, length - params.recent_tokens) / kUnitTokens, max(sink_end, visible));
    }
    return span;
}

// The part of one pair that a team works on: items [begin, end).
struct Segment {
    int request;
    int head;      // KV head
    int row_tile;
    int begin;
    int end;
};

// The first of a warp's items of a segment that is an exact unit; the warp takes every kTeamWarps-th item.
template <int kTeamWarps>
__device__ __forceinline__ int first_exact_item(const Span& span, const Segment& segment, int warp_in_team) {
    const int coded = max(0, span.coded_blocks - segment.begin - warp_in_team);
    return segment.begin + warp_in_team + ceil_div(coded, kTeamWarps) * kTeamWarps;
}

// A team's stretch, segment by segment.
template <bool kHasExact>
class Work {
  public:
    Work() = default;

    // Collective over a warp. `team` of `teams`, of `team_warps` each.
    __device__ __forceinline__ Work(const DecodeParams& params, int team, int teams, int team_warps) {
        const int lane = threadIdx.x % 32;
        const auto load_of = [&](int request) -> Load {
            if (request >= params.requests) return {0, 0};
            const Span span = request_span<kHasExact>(params, request);
            return {span.items(), span.row_tiles};
        };
        const Load first_round = load_of(lane);  // all there is, for 32 requests or fewer
        int items = first_round.items * first_round.tiles, longest = max(1, first_round.items);
        for (int request = lane + 32; request < params.requests; request += 32) {
            const Load own = load_of(request);
            items += own.items * own.tiles;
            longest = max(longest, own.items);
        }
        int head_length = __reduce_add_sync(kFullWarp, items);  // of one KV head's part of the list
        int total = head_length * params.kv_heads;
        longest = __reduce_max_sync(kFullWarp, longest);
        const int least = ceil_div(total, teams), even = round_up(least, team_warps);
        const int most = even + even / kAlignmentSlack;

        // Whole pairs a team, where they fit: nothing is merged. Else straight on, across pairs.
        const int whole = round_up(least, longest);
        stretch = whole <= most ? whole : even;
        aligned_ = false;
        if constexpr (kHasExact) {
            // Exact items make long pairs a little longer than a multiple of the stretch. Then each pair is cut from
            // its own beginning, where there are teams enough for that: one segment a team.
            if (whole > most) {
                const int pieces = max(1, longest * teams / max(1, total));
                const int piece = round_up(ceil_div(longest, pieces), team_warps);
                int parts = ceil_div(first_round.items, piece) * first_round.tiles;
                for (int request = lane + 32; request < params.requests; request += 32) {
                    const Load own = load_of(request);
                    parts += ceil_div(own.items, piece) * own.tiles;
                }
                parts = __reduce_add_sync(kFullWarp, parts);
                aligned_ = piece <= most && parts * params.kv_heads <= teams;
                if (aligned_) stretch = piece, head_length = parts * piece;  // as long as its pieces
                total = head_length * params.kv_heads;
            }
        }
        // The length of a pair in the list.
        const auto padded = [&](int own) { return kHasExact && aligned_ ? round_up(own, stretch) : own; };

        const int first = team * stretch;
        left_ = max(0, min(stretch, total - first));
        segment = {};
        if (left_ == 0) return;
        segment.head = first / head_length;
        const int in_head = first - segment.head * head_length;
        int before = 0;  // items of the requests before this round of 32
        for (int base = 0;; base += 32) {
            const Load own = base == 0 ? first_round : load_of(base + lane);
            const int own_padded = padded(own.items) * own.tiles;
            int upto = own_padded;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const int other = __shfl_up_sync(kFullWarp, upto, step);
                if (lane >= step) upto += other;
            }
            const unsigned ends_later = __ballot_sync(kFullWarp, before + upto > in_head);
            if (ends_later != 0) {
                const int found = __ffs(ends_later) - 1;
                const int items_before = before + __shfl_sync(kFullWarp, upto - own_padded, found);
                const int pair_items = __shfl_sync(kFullWarp, own.items, found), pair_length = padded(pair_items);
                const int offset = in_head - items_before;
                segment.request = base + found;
                segment.row_tile = offset / pair_length;
                segment.begin = offset - segment.row_tile * pair_length;
                segment.end = min(pair_items, segment.begin + left_);
                if (kHasExact && aligned_) left_ = segment.end - segment.begin;
                return;
            }
            before += __shfl_sync(kFullWarp, upto, 31);
        }
    }

    __device__ bool done() const { return left_ == 0; }

    __device__ __forceinline__ void next(const DecodeParams& params) {
        left_ -= segment.end - segment.begin;
        if (left_ == 0) return;
        Span span = request_span<kHasExact>(params, segment.request);
        if (++segment.row_tile == span.row_tiles) {
            segment.row_tile = 0;
            do {
                if (++segment.request == params.requests) segment.request = 0, ++segment.head;
                span = request_span<kHasExact>(params, segment.request);
            } while (span.row_tiles == 0);
        }
        segment.begin = 0;
        segment.end = min(span.items(), left_);
    }

    Segment segment;
    int stretch;  // items a team

  private:
    // Of one request, a KV head: items of a pair, and pairs.
    struct Load {
        int items;
        int tiles;
    };

    bool aligned_;  // pairs are cut from their own beginning, so a stretch lies in one
    int left_;  // items from segment.begin on
};

__device__ __forceinline__ int pair_index(const DecodeParams& params, const Segment& segment) {
    return (segment.head * params.requests + segment.request) * params.row_tiles + segment.row_tile;
}

// How many teams share the pair of a segment, and where its parts lie in scratch. Slots pair + team are distinct, and
// consecutive for the parts of one pair.
struct Split {
    int parts;
    int first_slot;
    int slot;
    int first_end;  // the item after the first part; those that follow have `stretch` items each

    // The part that holds an item.
    __device__ int part_of(int item, int stretch) const {
        return item < first_end ? 0 : 1 + (item - first_end) / stretch;
    }
};

__device__ __forceinline__ Split split_of(const DecodeParams& params, const Segment& segment, int pair_items,
                                          int stretch, int team) {
    const int pair = pair_index(params, segment);
    // This team's stretch begins at team * stretch, or inside the pair: `before` items of the pair precede it.
    const int before_teams = ceil_div(segment.begin, stretch);
    const int from_here = pair_items - segment.begin;
    // A segment that starts a pair may start anywhere in the team's stretch; what it takes of it is `end`.
    const int later_teams = ceil_div(from_here - (segment.end - segment.begin), stretch);
    const int first_team = team - before_teams;
    const int first_end = before_teams > 0 ? segment.begin - (before_teams - 1) * stretch : segment.end;
    return {before_teams + 1 + later_teams, pair + first_team, pair + team, first_end};
}

}  // namespace mq
