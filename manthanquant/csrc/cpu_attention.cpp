// Paged attention over packed units, for decode and prefill alike.
//
// Work is cut into items: one request, one KV head, up to kTileRows query rows (new tokens x the heads that share the KV
// head), and a range of the context's units. An item runs through its units in blocks: it decodes a block once, then all of its
// rows take scores, an online softmax and their share of the values. Units with exact copies are read from the hot pool instead,
// in the model's own space, into an accumulator of their own. Short of items (few requests, many threads), the context is cut
// too, and the parts are merged by their log-sum-exp.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
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

// A run of units of one kind: all coded, or all exact.
struct Block {
    int first_unit, units;
    bool exact;
    int64_t place[kBlockUnits];  // byte offset of a coded unit in the cache, or the slot of an exact one
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
          length_(args.seq_lens[item.request]),
          first_token_(args.query_start_loc[item.request]),
          first_position_(length_ - (args.query_start_loc[item.request + 1] - first_token_)) {}

    // Leaves the rows' states in the scratch.
    void attend() {
        load_queries();
        for (int unit = item_.first_unit; unit < item_.last_unit;) {
            const Block block = next_block(unit);
            const int first = first_row_that_sees(block), last = past_last_row_that_sees(block);
            if (first < last) {
                if (block.exact) {
                    attend_exact(block, first, last);
                } else {
                    attend_coded(block, first, last);
                }
            }
            unit += block.units;
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
        const int sinks = (args_.sink_tokens + kUnitTokens - 1) / kUnitTokens;
        const int recent = args_.recent_tokens > 0 ? std::max(0, length_ - args_.recent_tokens) / kUnitTokens
                                                   : std::numeric_limits<int>::max();
        const int32_t* pages = args_.block_table + item_.request * args_.block_table_stride;
        Block block{unit, 0, false, {}};
        for (; block.units < kBlockUnits && unit < item_.last_unit; ++unit, ++block.units) {
            const int64_t page = pages[unit / args_.cache.page_units];
            const int index = unit % args_.cache.page_units;
            int32_t slot = -1;
            if (args_.hot_slot && (unit < sinks || unit >= recent)) {
                slot = args_.hot_slot[page * args_.cache.page_units + index];
            }
            if (block.units > 0 && block.exact != (slot >= 0)) break;
            block.exact = slot >= 0;
            block.place[block.units] =
                block.exact ? slot : args_.cache.unit(page, item_.kv_head, index, KvUnit::bytes) - args_.cache.data;
        }
        return block;
    }

    // Rows are in order of position, so those that see something of a block are one run.
    int first_row_that_sees(const Block& block) const {
        const int position = block.first_unit * kUnitTokens - first_position_;  // earlier queries come before the block
        return std::clamp(position * group_ - item_.first_row, 0, item_.rows);
    }

    int past_last_row_that_sees(const Block& block) const {
        if (args_.window == 0) return item_.rows;
        const int last_token = (block.first_unit + block.units) * kUnitTokens - 1;
        return std::clamp((last_token + args_.window - first_position_) * group_ - item_.first_row, 0, item_.rows);
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
            const int64_t at = (block.place[u] * args_.kv_heads + item_.kv_head) * kUnitTokens * kHeadSize;
            for (int t = 0; t < kUnitTokens; ++t) {
                const uint16_t* key = args_.hot.key + at + t * kHeadSize;
                const uint16_t* value = args_.hot.value + at + t * kHeadSize;
                for (int d = 0; d < kHeadSize; ++d) s_.exact_key[d][u * kUnitTokens + t] = from_bfloat16(key[d]);
                for (int d = 0; d < kHeadSize; ++d) s_.exact_value[u * kUnitTokens + t][d] = from_bfloat16(value[d]);
            }
        }
        const int tokens = block.units * kUnitTokens;
        for_rows(first, last, [&](auto rows, int r) {
            for (int t = 0; t < tokens; t += kWidth) {
                Floats sums[rows()] = {};
                for (int d = 0; d < kHeadSize; ++d) {
                    const Floats key = load(&s_.exact_key[d][t]);
                    for (int i = 0; i < rows(); ++i) sums[i] += s_.query[r + i][d] * key;
                }
                for (int i = 0; i < rows(); ++i) store(&s_.scores[r + i][t], sums[i]);
            }
        });
        for (int r = first; r < last; ++r) soften(block, r, args_.soft_cap ? 0.0f : -s_.mean_score[r]);
        const int present = std::min(tokens, length_ - block.first_unit * kUnitTokens);
        for_rows(first, last, [&](auto rows, int r) {
            for (int d = 0; d < kHeadSize; d += kWidth) {
                Floats sums[rows()];
                for (int i = 0; i < rows(); ++i) sums[i] = load(&s_.state[r + i].exact[d]);
                for (int t = 0; t < present; ++t) {
                    const Floats value = load(&s_.exact_value[t][d]);
                    for (int i = 0; i < rows(); ++i) sums[i] += s_.scores[r + i][t] * value;
                }
                for (int i = 0; i < rows(); ++i) store(&s_.state[r + i].exact[d], sums[i]);
            }
        });
    }

    // A row's scores of a block become its softmax weights, relative to the row's maximum. `shift` is added to each score.
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
        const int start = block.first_unit * kUnitTokens, own = position(row);
        const int oldest = args_.window ? own - args_.window + 1 - start : 0;
        for (int t = 0; t < std::min(oldest, tokens); ++t) scores[t] = -kInfinity;
        for (int t = std::max(0, own + 1 - start); t < tokens; ++t) scores[t] = -kInfinity;

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
                const uint16_t half = Side::classes == 1 ? uint16_t(own[0] | own[1] << 8) : uint16_t(own[cls] << kE4m4Shift);
                const float factor = Side::classes == 1 ? 1.0f : float(1 << kE4m4Exponent);
                out[cls][unit * kUnitTokens + t] = from_half(half) * (factor * level_value(Side::bits(cls)));
            }
        }
    }

    // Calls `body(integral_constant rows, first)` for four rows at a time, then for the rest at once.
    template <class Body>
    static void for_rows(int first, int last, const Body& body) {
        for (; first + 4 <= last; first += 4) body(std::integral_constant<int, 4>(), first);
        switch (last - first) {
            case 3: return body(std::integral_constant<int, 3>(), first);
            case 2: return body(std::integral_constant<int, 2>(), first);
            case 1: return body(std::integral_constant<int, 1>(), first);
        }
    }

    const AttentionArgs& args_;
    const Item& item_;
    Scratch& s_;
    const int group_, length_, first_token_, first_position_;
};

void check(const AttentionArgs& args) {
    const int page_tokens = args.cache.page_units * kUnitTokens;
    for (int request = 0; request < args.requests; ++request) {
        const int32_t first = args.query_start_loc[request], last = args.query_start_loc[request + 1];
        if (first < 0 || last < first || last > args.tokens || last - first > args.seq_lens[request]) {
            throw std::out_of_range("query_start_loc[" + std::to_string(request) + "]: " + std::to_string(first) + " to " +
                                    std::to_string(last) + " of " + std::to_string(args.tokens) +
                                    " tokens, in a sequence of " + std::to_string(args.seq_lens[request]));
        }
        const int pages = (args.seq_lens[request] + page_tokens - 1) / page_tokens;
        if (pages > args.block_table_pages) {
            throw std::out_of_range("seq_lens[" + std::to_string(request) + "]: " + std::to_string(args.seq_lens[request]) +
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
        const int first_position = args.seq_lens[request] - tokens;
        for (int row = 0; row < tokens * group; row += kTileRows) {
            const int rows = std::min(kTileRows, tokens * group - row);
            const int oldest = args.window ? std::max(0, first_position + row / group - args.window + 1) : 0;
            const int newest = first_position + (row + rows - 1) / group;
            const int first = oldest / kUnitTokens, units = newest / kUnitTokens + 1 - first;
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
