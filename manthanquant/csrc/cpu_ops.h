// The two operations of the CPU extension, as plain structures of pointers and strides (in elements, unless in bytes).
#pragma once

#include <cstdint>

#include "cpu_simd.h"
#include "layout.h"

namespace mq::cpu {

// [tokens, heads, head size] of any float dtype and any strides.
struct Rows {
    char* data;
    Dtype dtype;
    int64_t token_stride, head_stride, channel_stride;

    char* at(int64_t token, int64_t head) const {
        return data + (token * token_stride + head * head_stride) * element_bytes(dtype);
    }
};

// uint8 [pages, KV heads, page tokens, token bytes]; a page and head is one run of units.
struct Cache {
    uint8_t* data;
    int64_t pages, page_stride, head_stride;
    int page_units;

    uint8_t* unit(int64_t page, int64_t head, int64_t index, int64_t unit_bytes) const {
        return data + page * page_stride + head * head_stride + index * unit_bytes;
    }
};

// One fp32 [head size, head size] matrix a KV head, or one for all (stride 0): out = in @ matrix.
struct Matrices {
    const float* data;
    int64_t head_stride;

    const float* of(int64_t head) const { return data + head * head_stride; }
};

// bf16 [slots, KV heads, 16, head size]; null where there is no hot tier.
struct HotPool {
    uint16_t* key;
    uint16_t* value;
    int64_t slots;
};

struct StoreArgs {
    Rows key, value;
    Cache cache;
    HotPool hot;
    const int64_t* slots;      // [tokens]: page * page tokens + offset, or -1
    const int64_t* hot_slots;  // [tokens]: slot * 16 + offset, or -1; null without a hot tier
    int64_t tokens;
    int kv_heads;
    Matrices key_forward, value_forward;  // transposes of SideTransform.forward
    const float* key_mean;                // [KV heads, head size] or null
};

struct AttentionArgs {
    Rows query, out;
    Rows chunk_key, chunk_value;  // of the new tokens, rows as query's; null: these are read from the cache too
    Cache cache;
    HotPool hot;
    const int32_t* hot_slot;     // [units]
    const int32_t* block_table;  // [requests, block_table_pages]
    int64_t block_table_stride, block_table_pages;
    const int32_t* seq_lens;         // [requests]
    const int32_t* query_start_loc;  // [requests + 1]
    int requests, heads, kv_heads;
    int64_t tokens;  // rows of query and out
    Matrices key_inverse;    // SideTransform.inverse
    Matrices value_inverse;  // its transpose
    const float* key_mean;
    float scale;
    float soft_cap;  // 0: none
    int window;      // tokens a query sees, itself included; 0: all
    int sink_tokens, recent_tokens;
};

// Codes new tokens into the cache; returns how many vectors were not finite. Throws std::out_of_range for a bad slot.
int64_t store(const StoreArgs& args);

// Attention of new tokens over their requests' earlier ones and their own. Throws std::out_of_range for a page that
// does not exist, and for lengths that do not fit together.
void attention(const AttentionArgs& args);

using Format = MQ_FORMAT;
constexpr int kHeadSize = MQ_HEAD_SIZE;
using KvUnit = Unit<Format, kHeadSize>;

}  // namespace mq::cpu
