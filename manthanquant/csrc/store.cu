// Store: new keys and values to codes in their pages, in one launch.
//
// A warp takes 16 tokens of one KV head and one side through all of it, in registers:
//
//   1. X, 16 tokens x head size, comes by asynchronous copies into shared memory, asked for one tile ahead.
//   2. Y = X T^T on the tensor cores, a group of channels at a time, sums in fp32, results in fp16. T is a matrix in
//      shared memory, whatever it stands for: gains, an order of channels, anything. Where tokens are many, the four
//      warps of a warpgroup multiply together (sm_90a). A Hadamard rotation needs less: a small product, then sums and
//      differences.
//   3. Norms by two shuffles among the four lanes of a token; then codes and EDEN scales, two elements an instruction.
//   4. Pack and write. The rows of T are dealt to fragments so that a lane ends up with exactly the channels that the
//      page wants it to own: keys need no exchange at all, values one 8 x 8 transposition of codes.
//
// A tile is 750 (warpgroups) to 900 instructions a lane, and issuing them takes as long as memory does: unrolled, few
// are spent on addresses and loops. The grid is no larger than what runs at once.
//
// Which 16 tokens? A window is 16 consecutive entries of slot_mapping, or 8 where tokens are few. Tokens that fill a
// whole unit, in order (the engine's order inside a prefill chunk), are taken unit by unit by the window where the unit
// starts, and their unit is written with plain vector stores. All others (decode steps, the ragged ends of chunks) are
// rows of the window as they come, from any units; a token's bits then go in by atomic AND and OR of disjoint masks. So
// warps that write to the same word never lose each other's bits, in whatever order the tokens are listed. Only a slot
// listed twice in one call gets a mix of both tokens; no other token is touched.
//
// Codes equal those of manthanquant.quantize except near a decision boundary (store_quantize.cuh); tests hold them to
// the tolerance in manthanquant/cuda/store.py. A vector with NaN or an infinity gets scale 0 and is counted; it stays
// in its own row of the matrix product.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "codebook.h"
#include "layout.h"
#include "ptx.cuh"
#include "rotation.cuh"
#include "store.h"
#include "store_pack.cuh"
#include "store_quantize.cuh"
#include "wgmma.cuh"

namespace mq {
namespace {

using Element = MQ_STORE_ELEMENT;  // __nv_bfloat16 or __half
using CacheUnit = Unit<MQ_FORMAT, MQ_HEAD_SIZE>;

constexpr int kHeadSize = MQ_HEAD_SIZE;
constexpr int kBlocks = kHeadSize / 16;  // blocks of 16 channels: k tiles of X, pairs of n tiles of Y
constexpr int kRows = 16;                // of a tile
constexpr int kElementBytes = 2;

constexpr int kRotationWarps = 4;                             // of a CTA, at most
constexpr int kMatrixWarps = 8;                               // they share a matrix
constexpr int kWarpsPerProcessor = kHeadSize > 128 ? 8 : 16;  // what registers allow, where tokens are many
constexpr int kLeastWindow = 8;                               // tokens a warp looks at, where tokens are few
constexpr int kManyTiles = 6;                                 // a processor: then warpgroups are worth their while

// Shared memory: T, each warp's next X.
constexpr int kRowBytes = kHeadSize * kElementBytes;
constexpr int kRowPitch = kRowBytes + 16;  // odd times 16 bytes: eight rows' reads meet no bank twice
constexpr int kWarpBytes = kRows * kRowPitch;

// Y is made, and rounded to fp16, so many blocks of channels at a time.
constexpr int kGroup = 4;
using GroupOfY = float[2 * kGroup][4];        // C fragments, two n tiles a block
using XFragments = uint32_t[kBlocks + 1][4];  // A fragments, a block each: X, and what MatrixOperand has behind it

// 16 rows of X on their way to a warp, in shared memory.
class Inbox {
public:
    __device__ __forceinline__ Inbox(uint8_t* shared, const StoreSide& side, int tokens, int head, int lane)
        : rows_(shared_address(shared)), lane_(lane), last_(tokens - 1), stride_(side.token_stride * kElementBytes) {
        // Four lanes a row: whole sectors of 32 bytes, and two addresses a lane for all of it.
        input_ = static_cast<const uint8_t*>(side.input) +
                 head * static_cast<int64_t>(side.head_stride) * kElementBytes + lane % 4 * 16;
    }

    // Asks for the rows of tokens `first` to `first` + 15. Past the last token it is read again, which costs nothing;
    // such rows have no slot.
    __device__ __forceinline__ void request(int first) const {
        __syncwarp();  // every lane has read what was here
        const int g = lane_ / 4, c = lane_ % 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint8_t* row = input_ + static_cast<int64_t>(min(first + g + 8 * half, last_)) * stride_;
            const uint32_t target = rows_ + (g + 8 * half) * kRowPitch + 16 * c;
#pragma unroll
            for (int i = 0; i < kRowBytes; i += 64)
                if (i + 64 <= kRowBytes || i + 16 * c < kRowBytes) cp_async_16(target + i, row + i);
        }
        cp_async_commit();
    }

    __device__ __forceinline__ void await() const {
        cp_async_wait<0>();
        __syncwarp();
    }

    // Brings the rows into L2, where whoever still writes them does so too: before the previous kernel has ended.
    __device__ __forceinline__ void prefetch(int first) const {
        constexpr int kLine = 128, kLines = (kRowBytes + kLine - 1) / kLine;  // of a row
        for (int i = lane_; i < kRows * kLines; i += kLanes) {
            const int64_t token = min(first + i / kLines, last_);
            prefetch_l2(input_ - lane_ % 4 * 16 + token * stride_ + i % kLines * kLine);
        }
    }

    // X into registers; then the next rows may be asked for.
    __device__ __forceinline__ void load(XFragments& x) const {
        load_blocks(x);
        constexpr uint32_t kOne = std::is_same_v<Element, __half> ? 0x3c00u : 0x3f80u;
        x[kBlocks][0] = x[kBlocks][1] = lane_ % 4 == 0 ? kOne | kOne << 16 : lane_ % 4 == 1 ? kOne : 0u;
        x[kBlocks][2] = x[kBlocks][3] = 0u;
    }

    // The rows, whatever they hold, as A fragments.
    template <int kCount>
    __device__ __forceinline__ void load_blocks(uint32_t (&fragments)[kCount][4]) const {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
            load_matrices(fragments[block], rows_ + lane_ % 16 * kRowPitch + lane_ / 16 * 16 + block * 32);
    }

    // Columns `column` and the next of a row.
    __device__ __forceinline__ void put(int row, int column, __half2 pair) const {
        const uint32_t place = rows_ + row * kRowPitch + column * kElementBytes;
        *static_cast<__half2*>(__cvta_shared_to_generic(place)) = pair;
    }

    __device__ __forceinline__ uint32_t rows() const { return rows_; }

private:
    uint32_t rows_;
    int lane_;
    int last_;    // token
    int stride_;  // bytes between tokens
    const uint8_t* input_;
};

// T comes as core matrices of 8 outputs x 8 inputs: [input / 8][output / 8][8 outputs][8 inputs]. Keys have a block of
// inputs behind the head, which are always 1, 1, 1, 0, ...: it takes off T mean, which comes in three parts.
constexpr int kCoreBytes = 8 * 8 * kElementBytes;
constexpr int kCores = kHeadSize / 8;                 // along outputs
constexpr int kInputBytes = 2 * kCores * kCoreBytes;  // of a block of inputs

// B fragments of a block of inputs and a block of outputs: [half of the outputs][half of the inputs].
using MatrixFragments = uint32_t[4];

// Block `i` of a group of Y: a block of X times a block of T.
__device__ __forceinline__ void multiply_block(GroupOfY& y, int i, bool first, const uint32_t (&x)[4],
                                               const MatrixFragments& b) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        if (first)
            mma_16bit_first<Element>(y[2 * i + n], x, b[2 * n], b[2 * n + 1]);
        else
            mma_16bit<Element>(y[2 * i + n], x, b[2 * n], b[2 * n + 1]);
    }
}

// T as it comes, in shared memory.
template <class Side, bool kHasMean>
class MatrixOperand {
public:
    static constexpr int kBytes = (kBlocks + 1) * kInputBytes;

    // All threads of the CTA: asks for it.
    __device__ __forceinline__ MatrixOperand(uint8_t* shared, const StoreSide& side, int head, int lane)
        : shared_(shared_address(shared)), lane_(lane) {
        const uint8_t* source = static_cast<const uint8_t*>(side.matrix) + head * side.matrix_head_stride;
        for (int i = 16 * threadIdx.x; i < (kBlocks + kHasMean) * kInputBytes; i += 16 * blockDim.x)
            cp_async_16(shared_ + i, source + i);
        cp_async_commit();
    }

    // Blocks `from` to `from` + `count` of Y = X T^T - T mean.
    __device__ __forceinline__ void multiply(GroupOfY& y, int from, int count, const XFragments& x) const {
        // Lanes 8 m to 8 m + 7 point at the rows of a core matrix: half m % 2 of the inputs, half m / 2 of the outputs.
        const int m = lane_ / 8;
        const uint32_t row = shared_ + (m % 2 * kCores + 2 * from + m / 2) * kCoreBytes + lane_ % 8 * 16;
#pragma unroll
        for (int in = 0; in < kBlocks + kHasMean; ++in) {
#pragma unroll
            for (int i = 0; i < count; ++i) {
                MatrixFragments b;
                load_matrices(b, row + in * kInputBytes + 2 * i * kCoreBytes);
                multiply_block(y, i, in == 0, x[in], b);
            }
        }
    }

    // The same by the four warps of a warpgroup together, each with its own tile: a whole group of blocks.
    __device__ __forceinline__ void multiply_together(GroupOfY& y, int from, const XFragments& x) const {
        const WgmmaOperand first(shared_ + 2 * from * kCoreBytes, kCores * kCoreBytes, kCoreBytes);
        wgmma_begin();
#pragma unroll
        for (int in = 0; in < kBlocks + kHasMean; ++in)
            wgmma<Element>(y, in > 0, x[in], first.at(in * kInputBytes));
        wgmma_end(y);
    }

private:
    uint32_t shared_;
    int lane_;
};

// T where it lies in global memory, by way of L1: for large heads, as not every GPU has the shared memory.
template <class Side, bool kHasMean>
class DistantOperand {
public:
    static constexpr int kBytes = 0;

    // A lane has row lane / 4 of each core matrix, and a pair of its columns.
    __device__ __forceinline__ DistantOperand(uint8_t*, const StoreSide& side, int head, int lane)
        : pairs_(static_cast<const uint8_t*>(side.matrix) + head * side.matrix_head_stride + 4 * lane) {}

    __device__ __forceinline__ void multiply(GroupOfY& y, int from, int count, const XFragments& x) const {
#pragma unroll
        for (int in = 0; in < kBlocks + kHasMean; ++in) {
#pragma unroll
            for (int i = 0; i < count; ++i) {
                const uint8_t* const block = pairs_ + in * kInputBytes + 2 * (from + i) * kCoreBytes;
                MatrixFragments b;
#pragma unroll
                for (int m = 0; m < 4; ++m)
                    b[m] = *reinterpret_cast<const uint32_t*>(block + (m % 2 * kCores + m / 2) * kCoreBytes);
                multiply_block(y, i, in == 0, x[in], b);
            }
            asm volatile("" ::: "memory");  // or the compiler loads much of T first, and spills
        }
    }

private:
    const uint8_t* pairs_;
};

// What single warps multiply by.
template <class Side, bool kHasMean>
using WarpOperand = std::conditional_t<MQ_WGMMA || kHeadSize <= 128, MatrixOperand<Side, kHasMean>,
                                       DistantOperand<Side, kHasMean>>;

// T = H diag(signs): H is block diagonal with Sylvester-Hadamard blocks, H[m][k] = (-1)^popcount(m & k) within a block.
// Bits 0 to 3 of m and k are a product by matrix instructions, with one 16 x 16 matrix a block of channels, its signs
// in it. So are bits that tell one group of blocks from another; those between are sums and differences of a group's
// blocks. Little of T is read, and no more shared memory taken.
template <class Side, bool kMayHaveMean>
class RotationOperand {
public:
    static constexpr int kBytes = kBlocks * 4 * kCoreBytes + kInputBytes;

    __device__ __forceinline__ RotationOperand(uint8_t* shared, const StoreSide& side, int head, int lane)
        : shared_(shared_address(shared)), lane_(lane), has_mean_(kMayHaveMean && side.has_mean) {
        const uint8_t* source = static_cast<const uint8_t*>(side.matrix) + head * side.matrix_head_stride;
        constexpr int kHalf = 2 * kCoreBytes;  // of a block of inputs, for one block of outputs: contiguous
        for (int i = 16 * threadIdx.x; i < kMeanAt; i += 16 * blockDim.x) {
            const int out = R::first_of_matrix(i / (2 * kHalf));
            cp_async_16(shared_ + i, source + (i / kHalf * kCores + 2 * out) * kCoreBytes + i % kHalf);
        }
        if (has_mean_) {
            for (int i = 16 * threadIdx.x; i < kInputBytes; i += 16 * blockDim.x)
                cp_async_16(shared_ + kMeanAt + i, source + kBlocks * kInputBytes + i);
        }
        cp_async_commit();
    }

    __device__ __forceinline__ void multiply(GroupOfY& y, int from, int count, const XFragments& x) const {
        const int m = lane_ / 8;  // as in MatrixOperand
        const uint32_t row = shared_ + lane_ % 8 * 16;
#pragma unroll
        for (int i = 0; i < count; ++i) {
            bool first = true;
#pragma unroll
            for (int in = 0; in < kBlocks; ++in) {
                if (!R::mixes(in, from + i) || (in - from - i) % count != 0) continue;
                MatrixFragments b;
                load_matrices(b, row + (4 * in + m % 2 * 2 + m / 2) * kCoreBytes);
                for (uint32_t& pair : b) pair ^= R::negates(in, from) ? kSignBits : 0u;
                multiply_block(y, i, first, x[in], b);
                first = false;
            }
        }
#pragma unroll
        for (int step = 1; step < count; step *= 2) {
#pragma unroll
            for (int i = 0; i < count; ++i) {
                if (!R::pairs(from + i, step)) continue;
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    float &low = y[2 * i + e / 4][e % 4], &high = y[2 * (i + step) + e / 4][e % 4];
                    const float sum = low + high;
                    high = low - high;
                    low = sum;
                }
            }
        }
        if (!has_mean_) return;
#pragma unroll
        for (int i = 0; i < count; ++i) {
            MatrixFragments b;
            load_matrices(b, row + kMeanAt + (m % 2 * kCores + 2 * (from + i) + m / 2) * kCoreBytes);
            multiply_block(y, i, false, x[kBlocks], b);
        }
    }

private:
    using R = Rotation<Side>;
    static constexpr int kMeanAt = kBlocks * 4 * kCoreBytes;
    uint32_t shared_;
    int lane_;
    bool has_mean_;
};

// What a window has to do: at most one whole unit that starts in it, and the tokens of no whole unit.
struct Window {
    int unit_start;      // row of the window where a whole unit starts, or -1
    uint32_t scattered;  // rows of the window to store one by one, as a bit mask
    int slot;            // of row `lane`, 32 of them: a whole unit may end in another window
};

__device__ __forceinline__ int slot_of(const StoreParams& p, int token) {
    return token >= 0 && token < p.tokens ? static_cast<int>(__ldg(p.slot_mapping + token)) : -1;
}

// Warp-wide. Tokens t to t + 15 are a whole unit if slot t is a multiple of 16 and the next 15 follow on. `slot` is of
// row `lane` of 32.
__device__ __noinline__ Window survey_ragged(const StoreParams& p, int first, int slot, int lane) {
    // Bit i of `high`: the token after first + i continues its slot. Of `low`: the same for first - 16 + i.
    const int after = __shfl_down_sync(kFullWarp, slot, 1), start = __shfl_sync(kFullWarp, slot, 0);
    const uint32_t high = __ballot_sync(kFullWarp, slot >= 0 && lane < kLanes - 1 && after == slot + 1);
    // Slots of the window before matter only if the rest of a unit is here. Single tokens hardly ever wait for them.
    const uint32_t rest = (1u << (kUnitTokens - 1 - start % kUnitTokens)) - 1;
    const bool may_continue = start > 0 && start % kUnitTokens != 0 && (high & rest) == rest;
    int before = __shfl_sync(kFullWarp, slot, lane % kRows);
    if (lane < kRows) before = may_continue ? slot_of(p, first - kRows + lane) : -1;
    const int after_before = __shfl_down_sync(kFullWarp, before, 1);
    const uint32_t low = __ballot_sync(kFullWarp, lane < kRows && before >= 0 && after_before == before + 1);
    const uint64_t follows = low | static_cast<uint64_t>(high) << kRows;
    constexpr uint32_t kRun = (1u << (kUnitTokens - 1)) - 1;
    const bool starts = before >= 0 && before % kUnitTokens == 0 && (follows >> lane & kRun) == kRun;
    const uint32_t start_mask = __ballot_sync(kFullWarp, starts);  // of tokens first - 16 to first + 15
    const bool in_unit = (start_mask >> (lane + 1) & 0xffffu) != 0;  // for lane < 16: is token first + lane covered?
    const uint32_t scattered = __ballot_sync(kFullWarp, lane < p.window && slot >= 0 && !in_unit);
    const uint32_t here = start_mask >> kRows & ((1u << p.window) - 1);
    return {here ? __ffs(here) - 1 : -1, scattered, slot};
}

// The same, by a short cut for a window that is one whole unit, as inside a long chunk.
__device__ __forceinline__ Window survey(const StoreParams& p, int first, int slot, int lane) {
    const int start = __shfl_sync(kFullWarp, slot, 0);
    const bool in_place = lane >= kRows || slot == start + lane;
    if (start >= 0 && start % kUnitTokens == 0 && __all_sync(kFullWarp, in_place)) return {0, 0u, slot};
    return survey_ragged(p, first, slot, lane);
}

__device__ __forceinline__ uint32_t to_bf16_pair(uint32_t pair) {
    if constexpr (std::is_same_v<Element, __nv_bfloat16>) return pair;
    const float2 wide = __half22float2(*reinterpret_cast<const __half2*>(&pair));
    const __nv_bfloat162 narrow = __floats2bfloat162_rn(wide.x, wide.y);
    return *reinterpret_cast<const uint32_t*>(&narrow);
}

// Writes those rows of the tile that have a hot slot there, of `mask`, one bit a row; or zeros. `shared` is where the
// tile lies.
__device__ __noinline__ void write_hot_rows(const StoreSide& side, const StoreParams& p, uint32_t shared, int first,
                                            uint32_t mask, bool zeros, int head, int lane) {
    constexpr int kPieces = kHeadSize / 8;
    const int64_t slot = lane < kRows && (mask >> lane & 1u) ? __ldg(p.hot_slots + first + lane) : int64_t{-1};
    for (uint32_t rows = __ballot_sync(kFullWarp, slot >= 0); rows; rows &= rows - 1) {
        const int row = __ffs(rows) - 1;
        const int64_t place = __shfl_sync(kFullWarp, slot, row);
        const int64_t vector = (place / kUnitTokens * p.kv_heads + head) * kUnitTokens + place % kUnitTokens;
        auto* target = reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(side.hot_pool) + vector * kHeadSize);
        for (int i = lane; i < kPieces; i += kLanes) {
            uint4 x = make_uint4(0u, 0u, 0u, 0u);
            if (!zeros) x = *static_cast<const uint4*>(__cvta_shared_to_generic(shared + row * kRowPitch + 16 * i));
            target[i] = make_uint4(to_bf16_pair(x.x), to_bf16_pair(x.y), to_bf16_pair(x.z), to_bf16_pair(x.w));
        }
    }
}

// `cache`: where the head's part of page 0 is.
__device__ __forceinline__ uint8_t* unit_address(const StoreParams& p, uint8_t* cache, int slot) {
    const uint32_t unit = static_cast<uint32_t>(slot) / kUnitTokens;
    const uint32_t page = p.page_shift >= 0 ? unit >> p.page_shift : unit / p.page_units;
    return cache + page * p.page_stride + (unit - page * p.page_units) * CacheUnit::bytes;
}

template <class Side, bool kIsKey>
__device__ __forceinline__ void write_whole_unit(uint8_t* unit, const uint32_t (&codes)[kBlocks],
                                                 const uint16_t (&scales)[2], int lane) {
    uint32_t pairs[kBlocks], words[Side::words];
    if constexpr (kIsKey) {
        key_pairs<Side>(pairs, codes);
    } else {
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) pairs[i] = __byte_perm(transpose_8x8(codes[i]), 0u, 0x3120u);
    }
    pack_words<Side>(words, pairs);
    store_words(words, unit + (kIsKey ? 0 : CacheUnit::value_offset), lane);
    if (lane % 4 == 0)
        *reinterpret_cast<uint32_t*>(unit + CacheUnit::scale_offset + scale_place(kIsKey ? 0 : 1, lane / 4)) =
            scales[0] | static_cast<uint32_t>(scales[1]) << 16;
}

// One token of a tile (the lane's row g or g + 8) into its unit.
template <class Side, bool kIsKey>
__device__ __forceinline__ void write_token(uint8_t* unit, const uint32_t (&codes)[kBlocks], int row, int token,
                                            uint16_t scales, int lane) {
    if constexpr (kIsKey) {
        scatter_key_row<Side>(codes, row, unit, token, lane % 4);
    } else {
        scatter_value_row<Side>(codes, row, unit + CacheUnit::value_offset, token, lane % 4);
    }
    if (lane % 4 == 0)
        *reinterpret_cast<uint16_t*>(unit + CacheUnit::scale_offset + scale_place(kIsKey ? 0 : 1, token)) = scales;
}

// Y of a tile.
template <class Side>
struct Transformed {
    uint32_t y[kBlocks][4];          // fp16 pairs: A fragments
    float square[2][Side::classes];  // squared norms of the lane's rows g and g + 8, a class each
};

// Whether warpgroups can do a side: only whole groups of blocks.
template <class Side>
constexpr bool kWholeGroups = Side::channels(0) % (16 * kGroup) == 0 &&
                              (Side::classes == 1 || Side::channels(1) % (16 * kGroup) == 0);

// `kTogether`: the warps of a warpgroup call it together.
template <class Side, bool kTogether, class Operand>
__device__ __forceinline__ void transform(Transformed<Side>& tile, const Operand& operand, const XFragments& x) {
#pragma unroll
    for (int cls = 0; cls < Side::classes; ++cls) {
        const int end = (Side::first_channel(cls) + Side::channels(cls)) / 16;
        float square[2] = {};
#pragma unroll
        for (int from = Side::first_channel(cls) / 16; from < end; from += kGroup) {
            const int count = end - from < kGroup ? end - from : kGroup;
            GroupOfY group;
            if constexpr (kTogether)
                operand.multiply_together(group, from, x);
            else
                operand.multiply(group, from, count, x);
#pragma unroll
            for (int i = 0; i < 4 * kGroup; ++i) {
                if (i >= 4 * count) break;
                const int block = i / 4, n = i / 2 % 2, row = i % 2;
                const float low = group[2 * block + n][2 * row], high = group[2 * block + n][2 * row + 1];
                square[row] += low * low;
                square[row] += high * high;
                tile.y[from + block][2 * n + row] = bits_of(__floats2half2_rn(low, high));
            }
        }
        for (int row = 0; row < 2; ++row) tile.square[row][cls] = sum_of_four_lanes(square[row]);
    }
}

// Whether fp16 does for `n` elements of this squared norm: none is too large, and boundaries are normal numbers.
__device__ __forceinline__ bool suits_fp16(float square, int n) { return square >= n * 0x1p-20f && square <= 0x1p31f; }

// Y once more, from X in the inbox, times `factor`. A block at a time, as it is rare: unrolled, it would need more
// registers than all the rest, which then spills. So Y goes where X was, and comes back.
template <class Side, class Operand>
__device__ __forceinline__ void transform_again(Transformed<Side>& tile, const float (&factor)[2][Side::classes],
                                                const Operand& operand, const Inbox& inbox, int lane) {
    XFragments x;
    inbox.load(x);
    __syncwarp();  // every lane has X
#pragma unroll
    for (int cls = 0; cls < Side::classes; ++cls) {
        const int first = Side::first_channel(cls) / 16;
        float square[2] = {};
#pragma unroll 1
        for (int block = first; block < first + Side::channels(cls) / 16; ++block) {
            GroupOfY y;  // of which one block
            operand.multiply(y, block, 1, x);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int n = i / 2, row = i % 2;
                const float low = y[n][2 * row] * factor[row][cls], high = y[n][2 * row + 1] * factor[row][cls];
                square[row] += low * low;
                square[row] += high * high;
                inbox.put(lane / 4 + 8 * row, 16 * block + 8 * n + 2 * (lane % 4), __floats2half2_rn(low, high));
            }
        }
        for (int row = 0; row < 2; ++row) tile.square[row][cls] = sum_of_four_lanes(square[row]);
    }
    __syncwarp();
    inbox.load_blocks(tile.y);
}

// Looks after rows that fp16 does not suit, which is rare: vectors that are not finite become zero, and are counted;
// very large and very small ones are transformed again, times `factor`, a power of two, which becomes other than 1.
// Row 0 of the tile is token `first`. Returns whether its rows were asked for again, and the next tile's are lost.
template <class Side, class Operand>
__device__ __forceinline__ bool mend(Transformed<Side>& tile, float (&factor)[2][Side::classes], const StoreParams& p,
                                     const StoreSide& side, const Operand& operand, const Inbox& inbox, uint32_t rows,
                                     int first, int head, int lane) {
    constexpr float kLargest = 3.40282347e38f;
    bool again = false, zero[2] = {};
    uint32_t bad = 0u;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float total = 0.f;
#pragma unroll
        for (int cls = 0; cls < Side::classes; ++cls) {
            const float square = tile.square[row][cls];
            total += square;
            if (square > 0.f && square <= kLargest && !suits_fp16(square, Side::channels(cls))) {
                factor[row][cls] = exp2f(static_cast<float>(-(ilogbf(square) >> 1)));
                again = true;
            }
        }
        zero[row] = !(total <= kLargest);
        if (zero[row]) bad |= 1u << (lane / 4 + 8 * row);
    }
    again = __any_sync(kFullWarp, again);
    if (again) {
        inbox.await();
        inbox.request(first);
        inbox.await();
        transform_again(tile, factor, operand, inbox, lane);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        if (zero[row]) {
            for (float& square : tile.square[row]) square = 0.f;  // then scale 0, whatever the codes
        }
    }
    bad = __reduce_or_sync(kFullWarp, bad) & rows;
    if (lane == 0 && bad != 0u && p.nonfinite != nullptr)
        atomicAdd(p.nonfinite, static_cast<unsigned long long>(__popc(bad)));
    if (p.hot_slots != nullptr) write_hot_rows(side, p, inbox.rows(), first, bad, true, head, lane);
    return again;
}

template <class Side>
__device__ __forceinline__ bool suits_fp16(const Transformed<Side>& tile) {
    bool result = true;
#pragma unroll
    for (int i = 0; i < 2 * Side::classes; ++i)
        result = result && suits_fp16(tile.square[i % 2][i / 2], Side::channels(i / 2));
    return result;
}

// One class of channels to codes, a word of eight nibbles a block. Of keys: row g's four, row g + 8's four. Of values:
// for column 2 c, then 2 c + 1, n tile 0's rows g and g + 8, n tile 1's.
template <class Side, bool kIsKey, int cls>
__device__ __forceinline__ void quantize_class(uint32_t (&codes)[kBlocks], float (&scale)[2][Side::classes],
                                               const Transformed<Side>& tile, const float (&factor)[2][Side::classes],
                                               const StoreSide& side, int lane) {
    constexpr int kChannels = Side::channels(cls), kFirst = Side::first_channel(cls) / 16;
    using Q = Quantizer<Side::bits(cls)>;
    constexpr float kTiny = 1e-38f;
    typename Q::Boundaries boundaries[2];
#pragma unroll
    for (int row = 0; row < 2; ++row)
        Q::scale_boundaries(boundaries[row], sqrt_approx(tile.square[row][cls] * (1.f / kChannels)));
    RowDots dots;
#pragma unroll
    for (int block = kFirst; block < kFirst + kChannels / 16; ++block) {
        QuantizedPair q[2][2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const uint32_t low = tile.y[block][2 * n], high = tile.y[block][2 * n + 1];
            q[n][0] = kIsKey && n == 1 ? Q::template pair<true>(low, boundaries[0])
                                       : Q::template pair<false>(low, boundaries[0]);
            q[n][1] = !kIsKey || n == 1 ? Q::template pair<true>(high, boundaries[1])
                                        : Q::template pair<false>(high, boundaries[1]);
        }
        dots.add(tile.y[block], q);
        uint32_t low, high;
        if constexpr (kIsKey) {
            low = __byte_perm(q[0][0].code, q[0][1].code, 0x6420u);
            high = __byte_perm(q[1][0].code, q[1][1].code, 0x6420u);
        } else {
            low = __byte_perm(q[0][0].code, q[1][0].code, 0x6240u);
            high = __byte_perm(q[0][1].code, q[1][1].code, 0x6240u);
        }
        codes[block] = Q::nibbles(low, high);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        // EDEN: |y|^2 / <y, levels>; the dot product still carries the codebook's unit, both `factor`.
        const float numerator = tile.square[row][cls] * (Q::kUnit * side.output_scale[cls]);
        scale[row][cls] = __fdividef(numerator, fmaxf(dots.row(row, lane), kTiny) * factor[row][cls]);
    }
}

// A tile to its slots. Row i of the tile is token first + i; `rows` says which there are, `slot` is lane i's.
template <class Side, bool kIsKey>
__device__ __forceinline__ void store_tile(const StoreParams& p, const StoreSide& side, const Transformed<Side>& tile,
                                           const float (&factor)[2][Side::classes], uint32_t rows, bool whole_unit,
                                           int slot, uint8_t* cache, int lane) {
    const int g = lane / 4;
    uint32_t codes[kBlocks];
    float scale[2][Side::classes];
    quantize_class<Side, kIsKey, 0>(codes, scale, tile, factor, side, lane);
    if constexpr (Side::classes == 2) quantize_class<Side, kIsKey, 1>(codes, scale, tile, factor, side, lane);
    const uint16_t scales[2] = {scale_bytes(scale[0]), scale_bytes(scale[1])};
    if (whole_unit) {
        write_whole_unit<Side, kIsKey>(unit_address(p, cache, __shfl_sync(kFullWarp, slot, 0)), codes, scales, lane);
        return;
    }
#pragma unroll 1
    for (int row = 0; row < 2; ++row) {
        if ((rows >> 8 * row & 0xffu) == 0u) continue;
        const int place = __shfl_sync(kFullWarp, slot, g + 8 * row);
        if ((rows >> (g + 8 * row) & 1u) == 0u) continue;
        write_token<Side, kIsKey>(unit_address(p, cache, place), codes, row, place % kUnitTokens,
                                  row == 0 ? scales[0] : scales[1], lane);
    }
}

// `kAtOnce`: the next rows are asked for as soon as X is in registers, not only once Y is there too.
template <class Side, bool kIsKey, class Operand, bool kTogether, bool kAtOnce>
__device__ __forceinline__ void store_side(const StoreParams& p) {
    const StoreSide& side = p.sides[kIsKey ? 0 : 1];
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
    const int head = blockIdx.y;
    extern __shared__ __align__(128) uint8_t shared[];
    const Inbox inbox(shared + Operand::kBytes + warp * kWarpBytes, side, p.tokens, head, lane);
    uint8_t* const cache = p.cache + head * p.head_stride;

    constexpr int kTeam = kTogether ? kWarpgroup : 1;  // its warps have windows side by side, and go on together
    const int windows = (p.tokens + p.window - 1) / p.window, step = gridDim.x * warps;
    int window = blockIdx.x * warps + warp;
    const auto team_has = [&](int i) { return i - warp % kTeam < windows; };
    const Operand operand(shared, side, head, lane);
    if (team_has(window)) inbox.prefetch(window * p.window);
    await_previous_kernel();  // so far only constants were read
    allow_next_kernel();
    // A window's rows are asked for before its slots are known: from where the previous one's unit started.
    int expected = 0, slot = -1;
    if (team_has(window)) {
        inbox.request(window * p.window);
        slot = slot_of(p, window * p.window + lane);
    } else {
        cp_async_commit();  // so that every warp's part of T is its last group but one
    }
    cp_async_wait<1>();
    if (kTogether) wgmma_publish();
    __syncthreads();  // T
    for (; team_has(window); window += step) {
        const int base = window * p.window, next = (window + step) * p.window;
        const Window work = survey(p, base, slot, lane);
        slot = slot_of(p, next + lane);
        bool whole = work.unit_start >= 0;
        uint32_t scattered = work.scattered;
        int start = whole ? work.unit_start : 0;
        inbox.await();
        if (start != expected) {
            inbox.request(base + start);
            inbox.await();
            expected = start;
        }
        bool again;
        do {  // at most twice; a loop, so that there is one copy of the code for both kinds of tile: it is long
            const uint32_t rows = whole ? 0xffffu : scattered;
            if (!whole) scattered = 0u;
            again = scattered != 0u;
            if constexpr (kTogether) again = warp < kTeam ? warpgroup_any<1>(again) : warpgroup_any<2>(again);
            if (p.hot_slots != nullptr) write_hot_rows(side, p, inbox.rows(), base + start, rows, false, head, lane);
            XFragments x;
            inbox.load(x);
            const auto request_next = [&] {
                if (again || team_has(window + step)) inbox.request(again ? base : next + expected);
            };
            if (kAtOnce) request_next();
            Transformed<Side> tile;
            float factor[2][Side::classes];
            for (auto& row : factor)
                for (float& f : row) f = 1.f;
            transform<Side, kTogether>(tile, operand, x);
            if (!__all_sync(kFullWarp, suits_fp16(tile))) {
                if (mend(tile, factor, p, side, operand, inbox, rows, base + start, head, lane) && kAtOnce)
                    request_next();
            }
            if (!kAtOnce) request_next();
            const int row_slot = __shfl_sync(kFullWarp, work.slot, start + lane % kRows);
            store_tile<Side, kIsKey>(p, side, tile, factor, rows, whole, row_slot, cache, lane);
            if (again) inbox.await();
            whole = false;
            start = 0;
        } while (again);
    }
}

// Grid: x shares out windows, y is the KV head, z the side. `kResident`: warps of a processor, at least.
template <template <class, bool> class Operand, int kWarps, int kResident, bool kTogether, bool kAtOnce>
__global__ void __launch_bounds__(kWarps* kLanes, kResident / kWarps) store_kernel(
    const __grid_constant__ StoreParams p) {
    using Key = CacheUnit::Key;
    using Value = CacheUnit::Value;
    if (blockIdx.z == 0)
        store_side<Key, true, Operand<Key, true>, kTogether, kAtOnce>(p);
    else
        store_side<Value, false, Operand<Value, false>, kTogether, kAtOnce>(p);
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <template <class, bool> class Operand, int kWarps, int kResident, bool kTogether, bool kAtOnce>
cudaError_t launch(const StoreParams& p, int processors, cudaStream_t stream) {
    const auto kernel = store_kernel<Operand, kWarps, kResident, kTogether, kAtOnce>;
    constexpr int kOperandBytes = Operand<CacheUnit::Key, true>::kBytes;
    int device = 0, most_shared = 0, resident = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status != cudaSuccess) return status;
    const int fitting = (most_shared - kOperandBytes) / kWarpBytes;
    const int pairs = 2 * p.kv_heads;  // of head and side
    const int windows = ceil_div(p.tokens, p.window);
    const int warps = kTogether ? kWarps : std::min({std::max(1, windows * pairs / processors), kWarps, fitting});
    const int shared = kOperandBytes + warps * kWarpBytes;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (status == cudaSuccess)
        status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, warps * kLanes, shared);
    if (status != cudaSuccess) return status;
    // No more CTAs than run at once: then a warp always has its next tile on the way, and T is loaded once.
    const int most = std::max(1, processors * resident / pairs);

    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(std::min(ceil_div(windows, warps), most), p.kv_heads, 2);
    config.blockDim = warps * kLanes;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = MQ_SM >= 90 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, p);
}

}  // namespace

cudaError_t launch_store(const StoreParams& params, cudaStream_t stream) {
    if (params.tokens == 0) return cudaSuccess;
    StoreParams p = params;
    int device = 0, processors = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (status != cudaSuccess) return status;
    // A few tokens are better spread over the processors: one by one they take long to write.
    const int pairs = 2 * p.kv_heads;  // of head and side
    for (p.window = kRows; p.window > kLeastWindow && 2 * ceil_div(p.tokens, p.window) * pairs <= processors;)
        p.window /= 2;
    if (p.sides[0].is_rotation && p.sides[1].is_rotation)
        return launch<RotationOperand, kRotationWarps, kWarpsPerProcessor, false, true>(p, processors, stream);
    constexpr bool kWarpgroups = MQ_WGMMA && kWholeGroups<CacheUnit::Key> && kWholeGroups<CacheUnit::Value>;
    if constexpr (kWarpgroups) {
        // With two classes that is 4% faster, as measured.
        constexpr bool kAtOnce = CacheUnit::Key::classes == 2;
        if (ceil_div(p.tokens, p.window) * pairs >= kManyTiles * processors)
            return launch<MatrixOperand, kMatrixWarps, kWarpsPerProcessor, true, kAtOnce>(p, processors, stream);
    }
    // The same: later, and with more registers where warpgroups take what fills a processor.
    constexpr int kResident = kWarpgroups ? kMatrixWarps : kWarpsPerProcessor;
    return launch<WarpOperand, kMatrixWarps, kResident, false, false>(p, processors, stream);
}

}  // namespace mq
