// What a decode kernel is built for and how it is tuned for that; what a warp and a team keep, and where it lies in
// shared memory. The names are those of decode_attention.cuh.
#pragma once

#include <initializer_list>
#include <type_traits>
#include <utility>

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
constexpr int kMaxExactUnits = 128;  // a sequence's sinks and recent units; at most 32 a warp, see ItemStream

constexpr int kSharedLimit =                 // bytes a CTA may have
    (MQ_SM == 80 ? 163 : MQ_SM == 86 || MQ_SM == 89 || MQ_SM == 120 ? 99 : 227) * 1024;

// Warps of the smallest teams. The exact tier leaves no shared memory for more teams, sixteen rows need four warps.
constexpr int smallest_team(int rows, bool has_exact) { return has_exact || rows == 16 ? 4 : 2; }
constexpr int most_teams(int warps, int team_warps) { return warps / team_warps > 2 ? warps / team_warps : 2; }

// The most warps up to `most` whose shares of shared memory fit beside what the teams take.
constexpr int warps_that_fit(int most, int warp_bytes, int team_warps, int team_bytes) {
    for (int warps : {16, 12, 8, 4})
        if (warps <= most && warps * warp_bytes + most_teams(warps, team_warps) * team_bytes <= kSharedLimit)
            return warps;
    return 2;
}

// What a kernel is built for, and how it is tuned for that. `kDense_`: a side's transform is dense.
template <class F, int kHeadSize_, int kRows_, int kTeamWarps_, bool kHasExact_, bool kDense_>
struct Variant {
    using Unit = mq::Unit<F, kHeadSize_>;
    static constexpr int kHeadSize = kHeadSize_;
    static constexpr int kRows = kRows_;
    static constexpr int kRowsPerLane = kRows / 4;
    static constexpr int kTeamWarps = kTeamWarps_;
    static constexpr bool kHasExact = kHasExact_;
    static constexpr bool kDense = kDense_;
    static constexpr bool kBulkCopy = MQ_BULK_COPY;

    // As many warps as registers and shared memory allow: the output and the accumulators of a large head or of many
    // rows take more of both.
    static constexpr int kRegisterWarps =
        kHeadSize > 128 || kRows == 16 ? 8 : (kRows == 8 && kHeadSize > 64 ? 12 : 16);
    // Sums that a product with a dense matrix is left as, of one half of the channels each.
    static constexpr int kSplits = kHeadSize > 64 && kHeadSize % 32 == 0 ? 2 : 1;
    static constexpr int kOutStride = kHeadSize + 4;  // of a row of floats in shared memory
    static constexpr int kSlotBytes = slot_bytes<Unit, kHasExact>();
    static constexpr int kWarpBytes = kSlotBytes + (kHasExact ? 2 : 1) * kRows * kHeadSize * 4;
    static constexpr int kSmallestTeam = smallest_team(kRows, kHasExact);
    // Alike for all transforms, so that a build has one number of warps. Last: rows may take more than fragments.
    static constexpr int kRowBytes = 4 * kRows * (kHeadSize + 8 + (kSplits + kHasExact) * kOutStride);  // RowBuffers
    static constexpr int kTeamBytes =
        2 * kRows * (kHeadSize + 16) + (kHasExact ? 4 * (kRows * (kHeadSize + 8) + kMaxExactUnits) : 0) + 1024 +
        (kRowBytes > kSmallestTeam * kRows * kHeadSize * 4 ? kRowBytes - kSmallestTeam * kRows * kHeadSize * 4 : 0);
    static constexpr int kWarps = warps_that_fit(kRegisterWarps, kWarpBytes, kSmallestTeam, kTeamBytes);
    static constexpr int kTeams = kWarps / kTeamWarps;
    static constexpr int kThreads = kWarps * kLanes;
    // About 100 KB in flight fill the memory system; more makes the SMs finish unequally.
    static constexpr bool kTwoStages =
        2 * kWarps * kSlotBytes <= 112 * 1024 &&
        kWarps * (kSlotBytes + kWarpBytes) + most_teams(kWarps, kSmallestTeam) * kTeamBytes <= kSharedLimit;
    static constexpr int kStages = kTwoStages ? 2 : 1;

    using Stream = ItemStream<Unit, kStages, kTeamWarps, kBulkCopy, kHasExact>;
    static_assert(kRows == 4 || kRows == 8 || kRows == 16);
    static_assert(kTeamWarps % kRowsPerLane == 0);

    static constexpr int kChannelTiles = kHeadSize / 8;          // of eight channels
    static constexpr int kTileFloats = kRows * kHeadSize;
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

// A pair's rows, while queries are prepared and outputs finished.
template <class V, bool kDense = V::kDense>
struct RowBuffers {
    float row[V::kRows][V::kOutStride];
    float exact[V::kHasExact ? V::kRows : 1][V::kOutStride];  // the exact tier's share of the output
};

template <class V>
struct RowBuffers<V, true> {
    union {
        float row[V::kRows][V::kOutStride];
        SplitRows<V::kRows, V::kHeadSize> split;  // what a dense matrix is to be multiplied by
    };
    float exact[V::kHasExact ? V::kRows : 1][V::kOutStride];
    float sums[V::kSplits][V::kRows][V::kOutStride];  // of products

    __device__ __forceinline__ float product(int index, int channel) const {
        return sums[0][index][channel] + (V::kSplits == 2 ? sums[V::kSplits - 1][index][channel] : 0.0f);
    }
};

template <class V>
struct ExactShared {
    Fragments<V> fragments;
    SplitRows<V::kRows, V::kHeadSize> query;
    int slots[kMaxExactUnits];  // of the pair's exact units; negative: not exact after all
};
struct NoExactShared {};

// What a team shares.
template <class V>
struct TeamShared {
    union {  // rows before the segment's blocks, fragments, then rows again
        Fragments<V> coded;
        RowBuffers<V> rows;
    };
    QueryTile<V::kRows, V::kHeadSize> query;
    int row_begin[V::kRows];  // the tokens each row sees
    int row_end[V::kRows];
    int length;
    QueryRange queries;
    Span span;
    Work<V::kHasExact> work;  // its segment is the one in work
    bool is_last;
    int dense_head;  // the KV head whose matrix `rows.split` meets, or -1
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

// The shared memory of the team that comes `team` places after the one at `first`.
template <class V>
__device__ __forceinline__ TeamShared<V>& team_shared(TeamShared<V>* first, int team) {
    return *reinterpret_cast<TeamShared<V>*>(reinterpret_cast<uint8_t*>(first) + team * SharedLayout<V>::kTeamBytes);
}

template <class V>
__device__ __forceinline__ void team_barrier(int team) {
    named_barrier<V::kTeamWarps * kLanes>(team + 1);
}

// Among all of a CTA's threads, none of which may have left. A team's threads meet first: racecheck loses track of
// warps that come to a barrier of all from different places, and reports hazards across it (across __syncthreads, too).
template <class V>
__device__ __forceinline__ void cta_barrier(int team) {
    static_assert(V::kTeams + 1 < 16);
    team_barrier<V>(team);
    named_barrier<V::kThreads>(V::kTeams + 1);
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

}  // namespace mq
