// What the prefix kernels are asked to do. Shared by prefix.cu and its binding.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mq {

// A run of a request's tokens and where it goes: tokens [first, last) of its pages to rows `row` onwards, then
// `chunk_tokens` tokens of the chunk, from `chunk_first` on, behind them. manthanquant/cuda/prefill.py makes these.
struct alignas(16) PrefixPiece {
    int request;
    int first;
    int last;
    int length;  // tokens that the request has in its pages, the chunk's own left out: says which units are exact
    int row;
    int chunk_first;
    int chunk_tokens;
    int first_tile;  // tiles of the pieces before this one; see PrefixParams::tiles
};

// One side, keys or values. Strides are in elements; rows of `head_size` elements are contiguous and start at multiples
// of 16 bytes.
struct PrefixSide {
    void* out;                      // [kv heads, rows, head size], bf16 or fp16 (MQ_PREFIX_ELEMENT)
    const void* matrix;             // T^-1 in fp16, see prefix.cu
    int64_t matrix_head_stride;     // in bytes; 0 where all heads share one
    const float* factor;            // [kv heads or 1]: times the product
    int64_t factor_head_stride;     // 0 where all heads share one
    const void* chunk;              // [tokens, kv heads, head size], like `out`
    int64_t chunk_token_stride;
    int64_t chunk_head_stride;
    const void* hot_pool;           // bf16 [slots, kv heads, 16, head size]; null for none
};

struct PrefixParams {
    PrefixSide sides[2];    // keys, values
    const float* key_mean;  // [kv heads, head size], added; null for none
    int64_t out_token_stride;
    int64_t out_head_stride;
    const PrefixPiece* pieces;
    int piece_count;
    int tiles;  // of all pieces. A tile is a unit of the pages, or up to 16 tokens of the chunk
    const int* block_table;  // [requests, pages]
    int64_t table_stride;
    const uint8_t* cache;  // [pages, kv heads, page tokens / 16, unit bytes], the last two contiguous
    int64_t page_stride;   // bytes
    int64_t head_stride;   // bytes
    int page_units;
    int kv_heads;
    const int* hot_slot;  // [units]: slot of the unit's exact copy, or -1; null for no exact tier
    int sink_units;
    int recent_tokens;
    uint32_t negative_zero;  // 0x80008000; see high_half
};

// Folds attention over more keys into what is there: both are normalised, and `lse` is the logarithm of the sum of
// exponentials that each was divided by. Head size contiguous; strides in elements.
struct MergeParams {
    void* out;  // [tokens, heads, head size], MQ_PREFIX_ELEMENT; updated
    int64_t out_token_stride;
    int64_t out_head_stride;
    float* lse;  // [heads, at least tokens]; updated
    int64_t lse_head_stride;
    const void* partial;  // [tokens, heads, head size], contiguous
    const float* partial_lse;  // [heads, tokens], contiguous; infinite: that row saw no key
    int tokens;
    int heads;
};

// Queue a kernel; do not synchronise.
cudaError_t launch_read_prefix(const PrefixParams& params, cudaStream_t stream);
cudaError_t launch_merge(const MergeParams& params, cudaStream_t stream);

}  // namespace mq
