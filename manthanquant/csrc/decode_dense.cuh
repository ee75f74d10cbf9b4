// Rows of queries or outputs times a dense matrix, by bf16 matrix instructions.
//
// Rows and matrix are sums of two bf16, high and low: 16 bits. Output channels are the instruction's M, rows its N: as
// with scores, four rows leave columns to spare, so a row's high and low parts are a column each.
//
// What costs is to fetch the matrix, 64 KB a KV head at D = 128, from L2. So warps share it out in pieces that fit
// their registers, and the first queries of all teams of a CTA, which mostly belong to one KV head, are multiplied at
// once; so are their last outputs. Between a team's segments it works alone.
#pragma once

#include "decode_query.cuh"
#include "decode_variant.cuh"

namespace mq {

// A warp's piece of a matrix: a tile of 16 output channels, and kSteps steps of 16 channels of the inner dimension; all
// pieces of a tile make a split sum. In a step lane 4 g + c has channels 4 c to 4 c + 3; memory is dealt alike: [KV
// head][tile][step][high, low][lane], four registers of two bf16.
template <class V, int kWarps>
class DenseProduct {
  public:
    // Collective over a warp. Asks for the warp's first piece; may come long before `multiply`.
    __device__ __forceinline__ void begin(const DenseTransform& transform, int kv_head, int warp, int lane) {
        if (transform.fragments != nullptr && warp < kPieces) load(transform, kv_head, warp, lane);
    }

    // Collective over kWarps warps, between barriers of theirs: products of the rows of kTeams teams, the first of
    // which has its shared memory at `first`.
    template <int kTeams>
    __device__ __forceinline__ void multiply(const DenseTransform& transform, TeamShared<V>* first, int warp,
                                             int lane) {
        constexpr int kAtOnce = kTeams % 4 == 0 ? 4 : kTeams % 2 == 0 ? 2 : 1;  // where they meet one matrix
#pragma unroll 1
        for (int piece = warp; piece < kPieces; piece += kWarps) {
#pragma unroll 1
            for (int team = 0; team < kTeams; team += kAtOnce) {
                const int head = team_shared(first, team).dense_head;
                bool alike = true;
#pragma unroll
                for (int i = 1; i < kAtOnce; ++i) alike = alike && team_shared(first, team + i).dense_head == head;
                if (alike) {
                    multiply_piece<kAtOnce>(transform, &team_shared(first, team), head, piece, lane);
                } else {
#pragma unroll 1
                    for (int i = team; i < team + kAtOnce; ++i)
                        multiply_piece<1>(transform, &team_shared(first, i), team_shared(first, i).dense_head, piece,
                                          lane);
                }
            }
        }
    }

  private:
    static constexpr int kTiles = V::kHeadSize / 16;
    static constexpr int kSteps = V::kHeadSize / 16 / V::kSplits;
    static constexpr int kPieces = kTiles * V::kSplits;
    static constexpr int kColumnTiles = column_tiles<V::kRows>();

    template <int kTeams>
    __device__ __forceinline__ void multiply_piece(const DenseTransform& transform, TeamShared<V>* first, int kv_head,
                                                   int piece, int lane) {
        if (kv_head < 0) return;
        if (piece != piece_ || kv_head != kv_head_) load(transform, kv_head, piece, lane);
        const int g = lane / 4, c = lane % 4, tile = piece % kTiles, split = piece / kTiles;
        float sum[kTeams][2][kColumnTiles][4] = {};  // of the matrix's high and low parts
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
            for (int plane = 0; plane < V::kQueryPlanes; ++plane)
#pragma unroll
                for (int team = 0; team < kTeams; ++team) {
                    const __nv_bfloat16* column = team_shared(first, team).rows.split.column(plane, g);
                    const uint2 b = *reinterpret_cast<const uint2*>(column + 16 * (split * kSteps + step) + 4 * c);
#pragma unroll
                    for (int part = 0; part < 2; ++part) {
                        const uint4& a = factor_[step][part];
                        mma_bf16(sum[team][part][plane / 2], a.x, a.y, a.z, a.w, b.x, b.y);
                    }
                }
#pragma unroll
        for (int team = 0; team < kTeams; ++team)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const auto column = [&](int tile_of_rows, int i) {
                    return sum[team][0][tile_of_rows][2 * half + i] + sum[team][1][tile_of_rows][2 * half + i];
                };
                const int channel = 16 * tile + 8 * half + g;
#pragma unroll
                for (int h = 0; h < V::kRowsPerLane; ++h)
                    team_shared(first, team).rows.sums[split][V::kRowsPerLane * c + h][channel] =
                        V::kRowsPerLane == 1 ? column(0, 0) + column(0, 1) : column(h / 2, h % 2);
            }
    }

    __device__ __forceinline__ void load(const DenseTransform& transform, int kv_head, int piece, int lane) {
        const uint4* matrix = reinterpret_cast<const uint4*>(transform.fragments + kv_head * transform.head_stride);
        matrix += (piece % kTiles * V::kSplits + piece / kTiles) * (kSteps * 2 * kLanes) + lane;
#pragma unroll
        for (int i = 0; i < 2 * kSteps; ++i) factor_[i / 2][i % 2] = __ldg(matrix + i * kLanes);
        kv_head_ = kv_head, piece_ = piece;
    }

    int kv_head_ = -1, piece_ = -1;  // that are in registers
    uint4 factor_[kSteps][2] = {};   // high, low; defined on every path, or it would take registers all the time
};

}  // namespace mq
