// The host's side of decode attention. A build holds one format, head size and row count, with or without the exact
// tier; it works on all requests of a step in one launch.
#pragma once

#include <cuda_runtime.h>

#include "decode_params.h"

namespace mq {

// What a build is and needs, for the caller's choices and scratch memory.
struct DecodeBuild {
    int rows;             // (query token, head) rows a pair
    int partial_floats;   // of a partial result; its weights are another `rows` floats
    int max_exact_units;  // of a sequence; 0 without the exact tier
    int warps;            // a CTA
    int large_team;       // warps
    int medium_team;
    int small_team;
};
DecodeBuild decode_build();

// Attention for every request. `ctas`: one a multiprocessor; `team_warps`: one of the build's team sizes.
cudaError_t launch_decode(const DecodeParams& params, int ctas, int team_warps, cudaStream_t stream);

}  // namespace mq
