// What the decode kernels are asked to do. Filled by the host, read by every thread.
#pragma once

#include <cstdint>

namespace mq {

enum class Dtype : int { kBf16 = 0, kFp16 = 1, kFp32 = 2 };

// A structured transform, T = H diag(factor) P: coded channel i is channel order[i] times factor[i], then each class
// goes through Hadamard butterflies (the 1/sqrt(block) of an orthonormal H is part of `factor`).
struct StructuredTransform {
    const float* factor;    // [KV heads, D]
    const int32_t* order;   // [KV heads, D], or null for the identity
    int64_t head_stride;    // elements between KV heads; 0 when all share one
};

// A dense transform: rows times a matrix, or a null pointer. bf16 fragments, see DenseProduct.
struct DenseTransform {
    const uint16_t* fragments;
    int64_t head_stride;  // elements between KV heads; 0 when all share one
};

struct DecodeParams {
    // The cache, strides in bytes; the units of one page and head are contiguous.
    const uint8_t* cache;
    int64_t page_stride;
    int64_t head_stride;
    int page_units;           // 16-token units a page
    uint32_t page_magic;      // ceil(2^31 / page_units), see page_of_unit
    const int32_t* block_table;  // [requests, table_stride]
    int64_t table_stride;
    const int32_t* seq_lens;  // [requests], the new tokens included

    // Queries and output, [tokens, heads, D], channels contiguous; strides in elements. Request r has the tokens
    // query_start_loc[r] to query_start_loc[r + 1], at most query_tokens; null: query_tokens each.
    const int32_t* query_start_loc;
    const void* query;
    Dtype query_dtype;
    int64_t query_token_stride;
    int64_t query_head_stride;
    void* out;
    Dtype out_dtype;
    int64_t out_token_stride;
    int64_t out_head_stride;

    int requests;
    int kv_heads;
    int group;         // query heads a KV head
    int query_tokens;  // a request at most, causal among themselves
    int tile_rows;     // kRows of the build
    int row_tiles;     // tiles of so many (token, head) rows that cover query_tokens * group

    float scale_log2;     // softmax scale * log2(e)
    float soft_cap_log2;  // soft cap * log2(e), 0 for none
    int window;           // tokens a query sees, itself included; 0 for all
    const float* sink_logits;  // [heads], or null: a learned logit that takes part in the softmax and has no value

    // Transforms, inverse. Key side: queries take the inverse transpose, so its factors are the reciprocals. A side is
    // structured or dense.
    StructuredTransform key_inverse;
    StructuredTransform value_inverse;
    const float* key_mean;  // [KV heads, D], or null
    DenseTransform key_matrix;    // queries times this
    DenseTransform value_matrix;  // outputs times this

    // The exact tier: bf16 [slots, KV heads, 16, D], strides in elements. A unit of a sequence is exact if it is a
    // sink or recent and hot_slot [pages * page_units] is not negative there.
    const uint16_t* hot_key;
    const uint16_t* hot_value;
    int64_t hot_slot_stride;
    int64_t hot_head_stride;
    const int32_t* hot_slot;
    int sink_units;
    int recent_tokens;

    // Scratch, see decode_workspace.
    float* partial_tiles;
    float* partial_weights;
    int* arrivals;

    uint32_t negative_zero;  // 0x80008000, see high_half
};

}  // namespace mq
