// New tokens to codes in their units: take the mean off, transform, quantise, and put each code's bits in place.
//
// Work is cut by KV head, and by unit within a head, so that no two threads write one unit.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <string>

#include "codebook.h"
#include "cpu_ops.h"

namespace mq::cpu {
namespace {

constexpr int kBatch = 16;  // vectors transformed together
constexpr float kHalfMaximum = 65504.0f;

struct Batch {
    int count = 0;
    int64_t token[kBatch];
    alignas(64) float x[kBatch][kHeadSize], y[kBatch][kHeadSize];
};

uint32_t& word_at(uint8_t* side, int words, int word, int lane) {
    return *reinterpret_cast<uint32_t*>(side + word_offset(word, words, lane));  // units are 4-byte aligned
}

// Replaces the code of one byte of a register, or of all four if `count` is 4: `nibbles` has them 4 bits apart.
template <class Side, int kClass>
void put(uint8_t* side, int lane, int reg, int byte, int count, uint32_t nibbles) {
    constexpr int bits = Side::bits(kClass), registers = Side::registers(kClass), first = Side::first_word(kClass);
    const uint32_t every = count == 4 ? 0x1111u : 0x1u;
    const BitPlace place = bit_place(bits, reg, registers, byte, 0);
    if (bits == 3 && bit_place(bits, reg, registers, byte, 1).word != place.word) {
        for (int bit = 0; bit < bits; ++bit) {
            uint32_t& word = word_at(side, Side::words, first + place.word + bit, lane);
            word = (word & ~(every << place.shift)) | (nibbles >> bit & every) << place.shift;
        }
    } else {
        uint32_t& word = word_at(side, Side::words, first + place.word, lane);
        word = (word & ~(every * ((1u << bits) - 1) << place.shift)) | nibbles << place.shift;
    }
}

template <int kBits>
uint32_t stored(int code) {  // at 4 bits, sign and magnitude
    return uint32_t(kBits != 4 ? code : code < 8 ? 15 - code : code - 8);
}

uint16_t e4m4_or_half(float scale, int classes) {
    if (classes == 1) return to_half(std::min(scale, kHalfMaximum));
    // Rounds in fp16's own grid to 4 mantissa bits; the sum carries into the exponent as rounding should.
    const int pattern = to_half(std::min(scale * (1.0f / (1 << kE4m4Exponent)), 1.9375f));
    return uint16_t(std::min((pattern + (1 << (kE4m4Shift - 1))) >> kE4m4Shift, 255));
}

// Codes of one class of a transformed vector, and their scale: |y|^2 / <y, codes>.
template <int kBits, int kCount>
float quantize(const float* y, uint8_t* codes) {
    using Book = Codebook<kBits>;
    float square = 0;
#pragma omp simd reduction(+ : square)
    for (int d = 0; d < kCount; ++d) square += y[d] * y[d];
    const float factor = std::sqrt(float(kCount)) / std::sqrt(std::max(square, 1e-38f));
    float product = 0;
#pragma omp simd reduction(+ : product)
    for (int d = 0; d < kCount; ++d) {
        const float unit = y[d] * factor;
        int code = 0;
        for (int i = 0; i < Book::count - 1; ++i) code += unit > Book::boundaries[i];
        float level = Book::levels[0] / Book::unit;
        for (int i = 0; i < Book::count - 1; ++i) {
            level = unit > Book::boundaries[i] ? Book::levels[i + 1] / Book::unit : level;
        }
        codes[d] = uint8_t(code);
        product += y[d] * level;
    }
    return square / std::max(product, 1e-30f);
}

template <class Side, bool kKeys, int kClass>
void store_class(const float* y, int token, uint8_t* side, uint8_t* scale_bytes) {
    constexpr int bits = Side::bits(kClass), channels = Side::channels(kClass), registers = Side::registers(kClass);
    uint8_t codes[channels];
    const float exact_scale = quantize<bits, channels>(y + Side::first_channel(kClass), codes);
    const uint16_t scale = e4m4_or_half(exact_scale, Side::classes);
    if constexpr (Side::classes == 1) {
        std::memcpy(scale_bytes, &scale, sizeof scale);
    } else {
        scale_bytes[kClass] = uint8_t(scale);
    }
    if constexpr (kKeys) {
        for (int channel = 0; channel < channels; channel += 4) {  // the four bytes of a register
            const CodePlace place = key_place(token, channel, registers);
            uint32_t nibbles = 0;
            for (int b = 0; b < 4; ++b) nibbles |= stored<bits>(codes[channel + b]) << kBitsPerRegisterByte * b;
            put<Side, kClass>(side, place.lane, place.reg, 0, 4, nibbles);
        }
    } else {
        for (int channel = 0; channel < channels; ++channel) {
            const CodePlace place = value_place(token, channel);
            put<Side, kClass>(side, place.lane, place.reg, place.byte, 1, stored<bits>(codes[channel]));
        }
    }
}

bool is_finite(const float* x) {
    float probe = 0;  // NaN if anything is not finite
#pragma omp simd reduction(+ : probe)
    for (int d = 0; d < kHeadSize; ++d) probe += x[d] * 0.0f;
    return probe == 0;
}

// Returns whether the vector was finite; one that was not becomes zero.
template <class Side, bool kKeys>
bool store_vector(float* y, int token, uint8_t* unit) {
    const bool finite = is_finite(y);
    if (!finite) std::fill_n(y, kHeadSize, 0.0f);
    uint8_t* side = unit + (kKeys ? 0 : KvUnit::value_offset);
    uint8_t* scale_bytes = unit + KvUnit::scale_offset + scale_place(kKeys ? 0 : 1, token);
    store_class<Side, kKeys, 0>(y, token, side, scale_bytes);
    if constexpr (Side::classes == 2) store_class<Side, kKeys, 1>(y, token, side, scale_bytes);
    return finite;
}

class Worker {
  public:
    Worker(const StoreArgs& args, int kv_head) : args_(args), kv_head_(kv_head) {}

    // Stores the tokens of every `parts`-th unit of this head, from the `part`-th on. Returns how many vectors were not
    // finite.
    int64_t run(int part, int parts) {
        return side<KvUnit::Key, true>(part, parts) + side<KvUnit::Value, false>(part, parts);
    }

  private:
    template <class Side, bool kKeys>
    int64_t side(int part, int parts) {
        int64_t bad = 0;
        batch_.count = 0;
        for (int64_t token = 0; token < args_.tokens; ++token) {
            const int64_t slot = args_.slots[token];
            if (slot < 0 || (slot / kUnitTokens) % parts != part) continue;
            batch_.token[batch_.count++] = token;
            if (batch_.count == kBatch) bad += flush<Side, kKeys>();
        }
        return bad + flush<Side, kKeys>();
    }

    template <class Side, bool kKeys>
    int64_t flush() {
        if (batch_.count == 0) return 0;
        const Rows& rows = kKeys ? args_.key : args_.value;
        const Matrices& forward = kKeys ? args_.key_forward : args_.value_forward;
        const float* mean = kKeys && args_.key_mean ? args_.key_mean + int64_t{kv_head_} * kHeadSize : nullptr;
        for (int i = 0; i < batch_.count; ++i) {
            const int64_t token = batch_.token[i];
            read_row(rows.at(token, kv_head_), rows.dtype, rows.channel_stride, kHeadSize, batch_.x[i]);
            copy_exactly(kKeys ? args_.hot.key : args_.hot.value, token, batch_.x[i]);
            for (int d = 0; mean && d < kHeadSize; ++d) batch_.x[i][d] -= mean[d];
        }
        multiply<kHeadSize>(batch_.x[0], batch_.count, forward.of(kv_head_), batch_.y[0]);
        int64_t bad = 0;
        for (int i = 0; i < batch_.count; ++i) {
            const int64_t unit = args_.slots[batch_.token[i]] / kUnitTokens;
            const int offset = int(args_.slots[batch_.token[i]] % kUnitTokens);
            uint8_t* to = args_.cache.unit(unit / args_.cache.page_units, kv_head_, unit % args_.cache.page_units,
                                           KvUnit::bytes);
            bad += !store_vector<Side, kKeys>(batch_.y[i], offset, to);
        }
        batch_.count = 0;
        return bad;
    }

    void copy_exactly(uint16_t* pool, int64_t token, const float* x) const {
        if (!args_.hot_slots || args_.hot_slots[token] < 0) return;
        const int64_t slot = args_.hot_slots[token] / kUnitTokens, offset = args_.hot_slots[token] % kUnitTokens;
        uint16_t* to = pool + ((slot * args_.kv_heads + kv_head_) * kUnitTokens + offset) * kHeadSize;
        const bool finite = is_finite(x);
        for (int d = 0; d < kHeadSize; ++d) to[d] = finite ? to_bfloat16(x[d]) : 0;
    }

    const StoreArgs& args_;
    const int kv_head_;
    Batch batch_;
};

void check_slots(const StoreArgs& args) {
    const int64_t slots = args.cache.pages * args.cache.page_units * kUnitTokens;
    for (int64_t i = 0; i < args.tokens; ++i) {
        if (args.slots[i] >= slots) {
            throw std::out_of_range("slot_mapping[" + std::to_string(i) + "]: " + std::to_string(args.slots[i]) +
                                    " of " + std::to_string(slots) + " slots");
        }
        if (args.hot_slots && args.hot_slots[i] >= args.hot.slots * kUnitTokens) {
            throw std::out_of_range("hot_slots[" + std::to_string(i) + "]: " + std::to_string(args.hot_slots[i]) +
                                    " of " + std::to_string(args.hot.slots * kUnitTokens));
        }
    }
}

}  // namespace

int64_t store(const StoreArgs& args) {
    check_slots(args);
    const int threads = omp_get_max_threads();
    const int parts = (threads + args.kv_heads - 1) / args.kv_heads;
    int64_t bad = 0;
#pragma omp parallel for schedule(static) reduction(+ : bad) num_threads(threads) if (threads > 1)
    for (int i = 0; i < args.kv_heads * parts; ++i) {
        bad += Worker(args, i % args.kv_heads).run(i / args.kv_heads, parts);
    }
    return bad;
}

}  // namespace mq::cpu
