// Decode attention as a build sees it. Macros choose what is compiled, so that a model builds only what it uses:
//   MQ_SM         architecture, e.g. 90
//   MQ_FORMAT     K3V3, K42V3, K42V42 or K4V4
//   MQ_HEAD_SIZE  64, 80, 96, 128 or 256
//   MQ_ROWS       4, 8 or 16 (query token, head) rows of a KV head at a time
//   MQ_EXACT      1: with the exact tier
//   MQ_BULK_COPY  0 forces the cp.async path where bulk copies exist
#include "decode.h"

#include <algorithm>

#include "decode_attention.cuh"

namespace mq {
namespace {

// Sixteen rows need more registers or shared memory than a large head or a small GPU leaves: there it is eight, twice.
constexpr int kRows = MQ_ROWS == 16 && (MQ_HEAD_SIZE > 128 || kSharedLimit < 160 * 1024) ? 8 : MQ_ROWS;

template <int kTeamWarps, bool kDense = false>
using Built = Variant<MQ_FORMAT, MQ_HEAD_SIZE, kRows, kTeamWarps, MQ_EXACT, kDense>;

// A large team is half of a large CTA, or all of a small one. Smaller ones are for so many pairs that each finds a team
// of its own.
constexpr int kWarps = Built<4>::kWarps;
constexpr int kLargeTeam = kWarps > 8 ? kWarps / 2 : kWarps;
constexpr int kSmallestTeam = smallest_team(kRows, MQ_EXACT);
constexpr int kMediumTeam = kLargeTeam == 2 ? 2 : kLargeTeam == 6 ? 4 : std::max(kLargeTeam / 2, kSmallestTeam);
constexpr int kSmallTeam = kLargeTeam == 6 ? 4 : std::min(kMediumTeam, kSmallestTeam);

constexpr int kPartialFloats = std::max({Built<kLargeTeam>::kPartialFloats, Built<kMediumTeam>::kPartialFloats,
                                         Built<kSmallTeam>::kPartialFloats});

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, int shared, cudaStream_t stream,
                   const Params& params) {
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = MQ_SM >= 90 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, params);
}

template <class V>
cudaError_t launch_variant(const DecodeParams& params, int ctas, cudaStream_t stream) {
    constexpr int kShared = SharedLayout<V>::kBytes;
    static const cudaError_t prepared =
        cudaFuncSetAttribute(decode_attention_kernel<V>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
    if (prepared != cudaSuccess) return prepared;
    return launch(decode_attention_kernel<V>, ctas, V::kThreads, kShared, stream, params);
}

template <bool kDense>
cudaError_t launch_teams(const DecodeParams& params, int ctas, int team_warps, cudaStream_t stream) {
    if (team_warps == kLargeTeam) return launch_variant<Built<kLargeTeam, kDense>>(params, ctas, stream);
    if (team_warps == kMediumTeam) return launch_variant<Built<kMediumTeam, kDense>>(params, ctas, stream);
    return launch_variant<Built<kSmallTeam, kDense>>(params, ctas, stream);
}

}  // namespace

DecodeBuild decode_build() {
    constexpr int kExactUnits = kMaxExactUnits < kLanes * kSmallTeam ? kMaxExactUnits : kLanes * kSmallTeam;
    return {kRows, kPartialFloats, MQ_EXACT ? kExactUnits : 0, kWarps, kLargeTeam, kMediumTeam, kSmallTeam};
}

cudaError_t launch_decode(const DecodeParams& params, int ctas, int team_warps, cudaStream_t stream) {
    // Structured transforms have a kernel without dense products, which cost it registers; with sixteen rows the one
    // that knows both spills less.
    if constexpr (kRows < 16) {
        if (params.key_matrix.fragments == nullptr && params.value_matrix.fragments == nullptr)
            return launch_teams<false>(params, ctas, team_warps, stream);
    }
    return launch_teams<true>(params, ctas, team_warps, stream);
}

}  // namespace mq
