// Paged attention over packed units, for decode and prefill alike.
//
// Work is cut into items: one request, one KV head, up to kTileRows query rows (new tokens x the heads that share the
// KV head), and a range of the context. An item runs through its context in blocks: it decodes a block once, then all
// of its rows take scores, an online softmax and their share of the values. Units with exact copies are read from the
// hot pool instead, and a prefill's new tokens from its own keys and values: these stay in the model's own space and
// have an accumulator of their own. Short of items (few requests, many threads), the context is cut too, and the parts
// are merged by their maxima.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu_ops.h"
#include "cpu_tile.h"

namespace mq::cpu {
namespace {

using Key = KvUnit::Key;
using Value = KvUnit::Value;

constexpr int kTileRows = 64;
constexpr int kMinimumSplitUnits = 32;  // a shorter part costs more to merge than it saves
constexpr float kLog2e = 1.44269504f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kVectors = kHeadSize / kWidth;

// What a query row has gathered so far: sum of weights and of weighted values, relative to 2^maximum.
struct RowState {
    float maximum;
    float total;
    alignas(64) float coded[kHeadSize];  // of values as coded
    alignas(64) float exact[kHeadSize];  // of values in the model's own space

    void clear() {
        maximum = -kInfinity;
        total = 0;
        std::fill_n(coded, kHeadSize, 0.0f);
        std::fill_n(exact, kHeadSize, 0.0f);
    }

    // Makes `level` the maximum.
    void rebase(float level) {
        const float factor = std::exp2(maximum - level);
        maximum = level;
        total *= factor;
        for (int d = 0; d < kHeadSize; ++d) coded[d] *= factor;
        for (int d = 0; d < kHeadSize; ++d) exact[d] *= factor;
    }

    void merge(RowState& other) {
        if (other.maximum == -kInfinity) return;
        if (other.maximum > maximum) rebase(other.maximum);
        other.rebase(maximum);
        total += other.total;
        for (int d = 0; d < kHeadSize; ++d) coded[d] += other.coded[d];
        for (int d = 0; d < kHeadSize; ++d) exact[d] += other.exact[d];
    }
};

struct Item {
    int request, kv_head;
    int first_row, rows;        // of the request's new tokens x group heads
    int first_unit, last_unit;  // one past
    int parts;                  // into which the context is cut
    int64_t part;               // where this one is saved, if there are several; they follow one another
    bool leads;                 // the first of them
};

// A request's context: tokens below `stored` are read from the cache, the rest from the chunk. Its units are those of
// the cache (the last one maybe in part), then those of the chunk.
struct Context {
    int stored, length;

    Context(const AttentionArgs& args, int request)
        : stored(args.seq_lens[request]), length(args.seq_lens[request]) {
        if (args.chunk_key.data) stored -= args.query_start_loc[request + 1] - args.query_start_loc[request];
    }

    int stored_units() const { return (stored + kUnitTokens - 1) / kUnitTokens; }
    int unit_of(int position) const {
        return position < stored ? position / kUnitTokens : stored_units() + (position - stored) / kUnitTokens;
    }
    int position_of(int unit) const {
        return unit < stored_units() ? unit * kUnitTokens : stored + (unit - stored_units()) * kUnitTokens;
    }
};

enum class Kind { kCoded, kHot, kChunk };

// A run of units of one kind.
struct Block {
    Kind kind;
    int units;
    int first_position, tokens;  // tokens that are there: the last unit may be partly filled
    int64_t place[kBlockUnits];  // each unit's offset in the cache in bytes, slot in the hot pool, or first chunk row
};

// Everything that one thread needs for one item.
struct Scratch {
    RowState state[kTileRows];
    alignas(64) float query[kTileRows][kHeadSize];  // times scale and log2 e
    alignas(64) float turned[kTileRows][kHeadSize];  // the same as the coded keys see it
    float mean_score[kTileRows];                     // query . key mean
    Queries<Key, kTileRows> queries;
    Weights<kTileRows> weights;
    KeyTile<Key> key_tile;
    ValueTile<Value> value_tile;
    alignas(64) float key_scales[2][kBlockTokens], value_scales[2][kBlockTokens];
    alignas(64) float exact_key[kHeadSize][kBlockTokens];
    alignas(64) float exact_value[kBlockTokens][kHeadSize];
    alignas(64) float scores[kTileRows][kBlockTokens];
};

class Worker {
  public:
    Worker(const AttentionArgs& args, const Item& item, Scratch& scratch)
        : args_(args),
          item_(item),
          s_(scratch),
          group_(args.heads / args.kv_heads),
          context_(args, item.request),
          first_token_(args.query_start_loc[item.request]),
          first_position_(context_.length - (args.query_start_loc[item.request + 1] - first_token_)) {}

    // Leaves the rows' states in the scratch.
    void attend() {
        load_queries();
        for (int unit = item_.first_unit; unit < item_.last_unit;) {
            const Block block = next_block(unit);
            unit += block.units;
            const int first = first_row_that_sees(block), last = past_last_row_that_sees(block);
            if (first < last) {
                if (block.kind == Kind::kCoded) {
                    attend_coded(block, first, last);
                } else {
                    attend_exact(block, first, last);
                }
            }
        }
    }

    // Takes the values' transform back and writes the output rows.
    void write(const RowState* states) {
        float* coded = s_.turned[0];  // the queries are no longer needed
        float* turned_back = s_.query[0];
        for (int r = 0; r < item_.rows; ++r) std::copy_n(states[r].coded, kHeadSize, coded + r * kHeadSize);
        multiply<kHeadSize>(coded, item_.rows, args_.value_inverse.of(item_.kv_head), turned_back);
        for (int r = 0; r < item_.rows; ++r) {
            float* row = turned_back + r * kHeadSize;
            const float factor = 1.0f / states[r].total;
            for (int d = 0; d < kHeadSize; ++d) row[d] = (row[d] + states[r].exact[d]) * factor;
            write_row(row, args_.out.dtype, args_.out.channel_stride, kHeadSize, args_.out.at(token(r), head(r)));
        }
    }

  private:
    int64_t token(int row) const { return first_token_ + (item_.first_row + row) / group_; }
    int head(int row) const { return item_.kv_head * group_ + (item_.first_row + row) % group_; }
    int position(int row) const { return first_position_ + (item_.first_row + row) / group_; }

    void load_queries() {
        for (int r = 0; r < item_.rows; ++r) {
            float* q = s_.query[r];
            read_row(args_.query.at(token(r), head(r)), args_.query.dtype, args_.query.channel_stride, kHeadSize, q);
            for (int d = 0; d < kHeadSize; ++d) q[d] *= args_.scale * kLog2e;
            s_.mean_score[r] = 0;
            if (args_.key_mean) {
                const float* mean = args_.key_mean + int64_t{item_.kv_head} * kHeadSize;
                Floats products = {};
                for (int v = 0; v < kVectors; ++v) products += load(q + v * kWidth) * load(mean + v * kWidth);
                s_.mean_score[r] = sum(products);
            }
            s_.state[r].clear();
        }
        multiply<kHeadSize>(s_.query[0], item_.rows, args_.key_inverse.of(item_.kv_head), s_.turned[0]);
        for (int r = 0; r < item_.rows; ++r) s_.queries.set(r, s_.turned[r]);
    }

    // The run of units of one kind from `unit` on, kBlockUnits at most.
    Block next_block(int unit) const {
        Block block{kind_and_place(unit).first, 0, context_.position_of(unit), 0, {}};
        for (; block.units < kBlockUnits && unit < item_.last_unit; ++unit, ++block.units) {
            const auto [kind, place] = kind_and_place(unit);
            if (kind != block.kind) break;
            block.place[block.units] = place;
        }
        const int end = block.kind == Kind::kChunk ? context_.length : context_.stored;
        block.tokens = std::min(block.units * kUnitTokens, end - block.first_position);
        return block;
    }

    std::pair<Kind, int64_t> kind_and_place(int unit) const {
        if (unit >= context_.stored_units()) {
            return {Kind::kChunk, first_token_ + (unit - context_.stored_units()) * kUnitTokens};
        }
        const int page_units = args_.cache.page_units;
        const int64_t page = args_.block_table[item_.request * args_.block_table_stride + unit / page_units];
        if (args_.hot_slot) {
            const int sinks = (args_.sink_tokens + kUnitTokens - 1) / kUnitTokens;
            const bool recent = args_.recent_tokens > 0 &&
                                unit >= std::max(0, context_.stored - args_.recent_tokens) / kUnitTokens;
            const int32_t slot = args_.hot_slot[page * page_units + unit % page_units];
            if (slot >= 0 && slot < args_.hot.slots && (unit < sinks || recent)) return {Kind::kHot, slot};
        }
        const uint8_t* place = args_.cache.unit(page, item_.kv_head, unit % page_units, KvUnit::bytes);
        return {Kind::kCoded, place - args_.cache.data};
    }

    // Rows are in order of position, so those that see something of a block are one run.
    int first_row_that_sees(const Block& block) const {
        return std::clamp((block.first_position - first_position_) * group_ - item_.first_row, 0, item_.rows);
    }

    int past_last_row_that_sees(const Block& block) const {
        if (args_.window == 0) return item_.rows;
        const int64_t position = int64_t{block.first_position} + block.tokens - 1 + args_.window;
        return int(std::clamp<int64_t>((position - first_position_) * group_ - item_.first_row, 0, item_.rows));
    }

    void attend_coded(const Block& block, int first, int last) {
        for (int u = 0; u < block.units; ++u) {
            const uint8_t* unit = args_.cache.data + block.place[u];
            s_.key_tile.decode(u, unit);
            read_scales<Key>(unit + KvUnit::scale_offset, 0, u, s_.key_scales);
            read_scales<Value>(unit + KvUnit::scale_offset, 1, u, s_.value_scales);
        }
        for_rows(first, last, [&](auto rows, int r) {
            s_.key_tile.template scores<rows()>(block.units, s_.queries, r, s_.key_scales, s_.scores + r);
        });
        for (int r = first; r < last; ++r) soften(block, r, args_.soft_cap ? s_.mean_score[r] : 0.0f);
        for (int u = 0; u < block.units; ++u) {
            s_.value_tile.decode(u, args_.cache.data + block.place[u] + KvUnit::value_offset);
        }
        for (int cls = 0; cls < Value::classes; ++cls) {
            for (int r = first; r < last; ++r) {
                alignas(64) float weights[kBlockTokens];
                for (int t = 0; t < block.units * kUnitTokens; ++t) {
                    // The scale of a token that is not there yet may be NaN.
                    weights[t] = s_.scores[r][t] > 0 ? s_.scores[r][t] * s_.value_scales[cls][t] : 0.0f;
                }
                s_.weights.set(r, block.units, weights);
            }
            for_rows(first, last, [&](auto rows, int r) {
                float* out[rows()];
                for (int i = 0; i < rows(); ++i) out[i] = s_.state[r + i].coded;
                s_.value_tile.template accumulate<rows()>(cls, block.units, s_.weights, r, out);
            });
        }
    }

    void attend_exact(const Block& block, int first, int last) {
        for (int u = 0; u < block.units; ++u) {
            const int count = std::min(kUnitTokens, block.tokens - u * kUnitTokens);
            for (int t = 0; t < count; ++t) {
                float key[kHeadSize];
                float* value = s_.exact_value[u * kUnitTokens + t];
                if (block.kind == Kind::kHot) {
                    const int64_t row = (block.place[u] * args_.kv_heads + item_.kv_head) * kUnitTokens + t;
                    read_row(args_.hot.key + row * kHeadSize, Dtype::kBfloat16, 1, kHeadSize, key);
                    read_row(args_.hot.value + row * kHeadSize, Dtype::kBfloat16, 1, kHeadSize, value);
                } else {
                    read_chunk(args_.chunk_key, block.place[u] + t, key);
                    read_chunk(args_.chunk_value, block.place[u] + t, value);
                }
                for (int d = 0; d < kHeadSize; ++d) s_.exact_key[d][u * kUnitTokens + t] = key[d];
            }
        }
        for_rows(first, last, [&](auto rows, int r) {
            const float* query[rows()];
            float* scores[rows()];
            for (int i = 0; i < rows(); ++i) query[i] = s_.query[r + i], scores[i] = s_.scores[r + i];
            product<rows()>(query, kHeadSize, s_.exact_key[0], kBlockTokens, block.units * kUnitTokens, scores, false);
        });
        for (int r = first; r < last; ++r) soften(block, r, args_.soft_cap ? 0.0f : -s_.mean_score[r]);
        for_rows(first, last, [&](auto rows, int r) {
            const float* weights[rows()];
            float* out[rows()];
            for (int i = 0; i < rows(); ++i) weights[i] = s_.scores[r + i], out[i] = s_.state[r + i].exact;
            product<rows()>(weights, block.tokens, s_.exact_value[0], kHeadSize, kHeadSize, out, true);
        });
    }

    void read_chunk(const Rows& chunk, int64_t row, float* to) const {
        read_row(chunk.at(row, item_.kv_head), chunk.dtype, chunk.channel_stride, kHeadSize, to);
    }

    // A row's scores of a block, with `shift` added, become its softmax weights relative to the row's maximum.
    void soften(const Block& block, int row, float shift) {
        float* scores = s_.scores[row];
        RowState& state = s_.state[row];
        const int tokens = block.units * kUnitTokens;
        if (shift != 0) {
            for (int t = 0; t < tokens; t += kWidth) store(scores + t, load(scores + t) + shift);
        }
        if (args_.soft_cap) {
            const float cap = args_.soft_cap * kLog2e;
            for (int t = 0; t < tokens; t += kWidth) {
                store(scores + t, cap * tanh(load(scores + t) * (1.0f / cap)));
            }
        }
        const int own = position(row) - block.first_position;
        const int oldest = args_.window ? own - args_.window + 1 : 0;
        for (int t = 0; t < std::min(oldest, tokens); ++t) scores[t] = -kInfinity;
        for (int t = std::clamp(own + 1, 0, block.tokens); t < tokens; ++t) scores[t] = -kInfinity;

        Floats most = load(scores);
        for (int t = kWidth; t < tokens; t += kWidth) most = maximum(most, load(scores + t));
        const float level = maximum(most);
        if (level > state.maximum) state.rebase(level);
        Floats total = {};
        for (int t = 0; t < tokens; t += kWidth) {
            const Floats weight = exp2(load(scores + t) - state.maximum);
            store(scores + t, weight);
            total += weight;
        }
        state.total += sum(total);
    }

    template <class Side>
    static void read_scales(const uint8_t* scales, int side, int unit, float (*out)[kBlockTokens]) {
        for (int t = 0; t < kUnitTokens; ++t) {
            const uint8_t* own = scales + scale_place(side, t);
            for (int cls = 0; cls < Side::classes; ++cls) {
                const int half = Side::classes == 1 ? own[0] | own[1] << 8 : own[cls] << kE4m4Shift;
                const float factor = Side::classes == 1 ? 1.0f : float(1 << kE4m4Exponent);
                out[cls][unit * kUnitTokens + t] = from_half(uint16_t(half)) * (factor * level_value(Side::bits(cls)));
            }
        }
    }

    const AttentionArgs& args_;
    const Item& item_;
    Scratch& s_;
    const int group_;
    const Context context_;
    const int first_token_, first_position_;
};

void check(const AttentionArgs& args) {
    const int page_tokens = args.cache.page_units * kUnitTokens;
    for (int request = 0; request < args.requests; ++request) {
        const int32_t first = args.query_start_loc[request], last = args.query_start_loc[request + 1];
        if (first < 0 || last < first || last > args.tokens || last - first > args.seq_lens[request]) {
            throw std::out_of_range("query_start_loc[" + std::to_string(request) + "]: " + std::to_string(first) +
                                    " to " + std::to_string(last) + " of " + std::to_string(args.tokens) +
                                    " tokens, in a sequence of " + std::to_string(args.seq_lens[request]));
        }
        const int pages = (args.seq_lens[request] + page_tokens - 1) / page_tokens;
        if (pages > args.block_table_pages) {
            throw std::out_of_range("seq_lens[" + std::to_string(request) +
                                    "]: " + std::to_string(args.seq_lens[request]) +
                                    " tokens need more pages than a row of block_table has");
        }
        for (int i = 0; i < pages; ++i) {
            const int32_t page = args.block_table[request * args.block_table_stride + i];
            if (page < 0 || page >= args.cache.pages) {
                throw std::out_of_range("block_table[" + std::to_string(request) + "][" + std::to_string(i) +
                                        "]: page " + std::to_string(page) + " of " + std::to_string(args.cache.pages));
            }
        }
    }
}

std::vector<Item> plan(const AttentionArgs& args, int threads) {
    std::vector<Item> items;
    const int group = args.heads / args.kv_heads;
    int64_t whole = 0;
    for (int request = 0; request < args.requests; ++request) {
        const int rows = (args.query_start_loc[request + 1] - args.query_start_loc[request]) * group;
        whole += int64_t{(rows + kTileRows - 1) / kTileRows} * args.kv_heads;
    }
    const int wanted = whole ? int((threads + whole - 1) / whole) : 1;  // parts, so that every thread has an item
    int64_t saved = 0;
    for (int request = 0; request < args.requests; ++request) {
        const int tokens = args.query_start_loc[request + 1] - args.query_start_loc[request];
        const Context context(args, request);
        const int first_position = context.length - tokens;
        for (int row = 0; row < tokens * group; row += kTileRows) {
            const int rows = std::min(kTileRows, tokens * group - row);
            const int oldest = args.window ? std::max(0, first_position + row / group - args.window + 1) : 0;
            const int newest = first_position + (row + rows - 1) / group;
            const int first = context.unit_of(oldest), units = context.unit_of(newest) + 1 - first;
            const int parts = std::clamp(units / kMinimumSplitUnits, 1, wanted);
            for (int kv_head = 0; kv_head < args.kv_heads; ++kv_head) {
                for (int part = 0; part < parts; ++part) {
                    items.push_back({request, kv_head, row, rows, first + units * part / parts,
                                     first + units * (part + 1) / parts, parts, parts == 1 ? 0 : saved++, part == 0});
                }
            }
        }
    }
    return items;
}

Scratch& own_scratch() {
    static thread_local std::unique_ptr<Scratch> scratch(new Scratch);
    return *scratch;
}

}  // namespace

void attention(const AttentionArgs& args) {
    check(args);
    const int threads = omp_get_max_threads();
    const std::vector<Item> items = plan(args, threads);
    const int64_t parts = std::count_if(items.begin(), items.end(), [](const Item& item) { return item.parts > 1; });
    std::vector<RowState> saved(parts * kTileRows);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (items.size() > 1 && threads > 1)
    for (size_t i = 0; i < items.size(); ++i) {
        Scratch& scratch = own_scratch();
        Worker worker(args, items[i], scratch);
        worker.attend();
        if (items[i].parts == 1) {
            worker.write(scratch.state);
        } else {
            std::copy_n(scratch.state, items[i].rows, &saved[items[i].part * kTileRows]);
        }
    }
    if (saved.empty()) return;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (size_t i = 0; i < items.size(); ++i) {
        if (items[i].parts == 1 || !items[i].leads) continue;
        RowState* whole = &saved[items[i].part * kTileRows];
        for (int part = 1; part < items[i].parts; ++part) {
            for (int r = 0; r < items[i].rows; ++r) whole[r].merge(whole[part * kTileRows + r]);
        }
        Worker(args, items[i], own_scratch()).write(whole);
    }
}

}  // namespace mq::cpu
