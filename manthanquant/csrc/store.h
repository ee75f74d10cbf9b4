// What the store kernel is asked to do. Shared by store.cu and its binding.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mq {

// One side, keys or values, of the new tokens. Strides are in elements; rows of `head_size` elements are contiguous
// and start at multiples of 16 bytes.
struct StoreSide {
    const void* input;  // [tokens, kv heads, head size], bf16 or fp16 (MQ_STORE_ELEMENT)
    int32_t token_stride;
    int32_t head_stride;
    const void* matrix;          // T, [heads][input / 8][output / 8][8][8], see Matrix in store.cu
    int64_t matrix_head_stride;  // in bytes; 0 where all heads share one
    bool is_rotation;            // T is a Hadamard rotation: signs, sums and differences
    bool has_mean;               // keys alone may have one
    float output_scale[2];  // T x times this is the transformed vector; one a class of channels
    void* hot_pool;       // bf16 [slots, kv heads, 16, head size]; null for none
};

struct StoreParams {
    StoreSide sides[2];  // keys, values
    const int64_t* slot_mapping;  // [tokens]: page * page tokens + offset; below 0: skip
    const int64_t* hot_slots;     // [tokens]: slot * 16 + offset; below 0: no copy. Null for none
    uint8_t* cache;               // [pages, kv heads, page tokens / 16, unit bytes], the last two contiguous
    int64_t page_stride;          // bytes
    int64_t head_stride;          // bytes
    unsigned long long* nonfinite;  // counts vectors that held NaN or an infinity; may be null
    int tokens;
    int kv_heads;
    int page_units;
    int page_shift;  // log2(page_units), or -1 where that is no whole number: a shift beats a division
    int window = 0;  // tokens a warp looks at, at most 16: set at launch
};

// Queues the kernel; does not synchronise.
cudaError_t launch_store(const StoreParams& params, cudaStream_t stream);

}  // namespace mq
