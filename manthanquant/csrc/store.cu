// Store: new keys and values to codes in their pages, in one launch.
//
// A warp takes 16 tokens of one KV head and one side through all of it, in registers:
//
//   1. X, 16 tokens x head size, comes by asynchronous copies into shared memory, asked for one tile ahead.
//   2. Y = X T^T on the tensor cores, all of it in accumulators. A rotation, with gains or without, is a small product
//      and then sums and differences of accumulators; its order of channels costs a pass through shared memory. A
//      dense transform is a matrix in shared memory.
//   3. Norms by two shuffles among the four lanes of a token; then codes and EDEN scales, two elements an instruction.
//   4. Pack and write. The columns of T are dealt to fragments so that a lane ends up with exactly the channels that
//      the page wants it to own: keys need no exchange at all, values one 8 x 8 transposition of codes.
//
// A tile is about 1,000 instructions a lane, and issuing them is what takes the time: unrolled, none is spent on
// addresses and loops. The grid is no larger than what runs at once.
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

namespace mq {
namespace {

using Element = MQ_STORE_ELEMENT;  // __nv_bfloat16 or __half
using CacheUnit = Unit<MQ_FORMAT, MQ_HEAD_SIZE>;

constexpr int kHeadSize = MQ_HEAD_SIZE;
constexpr int kBlocks = kHeadSize / 16;  // blocks of 16 channels: k tiles of X, pairs of n tiles of Y
constexpr int kRows = 16;                // of a tile

constexpr int kWarps = 4;                                     // of a CTA
constexpr int kMatrixWarps = kHeadSize > 128 ? 4 : 8;         // share a matrix in shared memory, if they fit
constexpr int kWarpsPerProcessor = kHeadSize > 128 ? 8 : 16;  // what registers allow
constexpr int kLeastWindow = 8;                               // tokens a warp looks at, where tokens are few

// Shared memory: the operand's fragments, each warp's next X, a counter.
constexpr int kMatrixBytes = kHeadSize * kHeadSize * 2;
constexpr int kRotationBytes = kHeadSize * 16 * 2;
constexpr int kRowPitch = kHeadSize * 2 + 16;  // an odd number of 16 bytes: eight rows' reads meet no bank twice
constexpr int kWarpBytes = kRows * kRowPitch;
constexpr int kCounterBytes = 16;

// The channel, in a block of 16, of column n (0..7) of the block's n tile 0 or 1. Keys: the lane that holds columns
// 2 c and 2 c + 1 of both tiles gets channels 4 c to 4 c + 3. Values: as they come.
template <bool kIsKey>
__device__ constexpr int output_channel(int tile, int column) {
    return kIsKey ? 4 * (column / 2) + 2 * (column % 2) + tile : 8 * tile + column;
}

// 16 rows of X on their way to a warp, in shared memory.
class Inbox {
public:
    __device__ __forceinline__ Inbox(uint8_t* shared, int lane) : rows_(shared_address(shared)), lane_(lane) {}

    // Asks for the rows of tokens `first` to `first` + 15. Past the last token it is read again, which costs nothing;
    // such rows have no slot.
    __device__ __forceinline__ void request(const StoreSide& side, const StoreParams& p, int first, int head) const {
        __syncwarp();  // every lane has read what was here
        // Four lanes a row: whole sectors of 32 bytes, and two addresses a lane for all of it.
        const int g = lane_ / 4, c = lane_ % 4;
        const auto* input = static_cast<const Element*>(side.input) + head * side.head_stride + 8 * c;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t token = min(first + g + 8 * half, p.tokens - 1);
            const auto* row = input + token * side.token_stride;
            const uint32_t target = rows_ + (g + 8 * half) * kRowPitch + 16 * c;
#pragma unroll
            for (int i = 0; i < kHeadSize; i += 32)
                if (i + 32 <= kHeadSize || i + 8 * c < kHeadSize) cp_async_16(target + 2 * i, row + i);
        }
        cp_async_commit();
    }

    __device__ __forceinline__ void await() const {
        cp_async_wait<0>();
        __syncwarp();
    }

    // A fragments, a block of 16 channels each.
    __device__ __forceinline__ void load(uint32_t (&a)[4], int block) const {
        load_matrices(a, rows_ + lane_ % 16 * kRowPitch + lane_ / 16 * 16 + block * 32);
    }

    // The same with channels in another order. Channels become rows of shared memory, of eight tokens each, and the
    // fragments are read from those by address: `order[block][lane]` says where the lane's row begins.
    __device__ __forceinline__ void reorder(uint32_t (&x)[kBlocks][4], const uint32_t* order) const {
        __syncwarp();
        const uint32_t row = rows_ + lane_ / 8 % 2 * (kHeadSize * 16) + (lane_ / 16 * 8 + lane_ % 8) * 16;
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) store_matrices_transposed(row + block * 256, x[block]);
        __syncwarp();
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
            load_matrices_transposed(x[block], rows_ + __ldg(order + block * kLanes + lane_));
    }

    __device__ __forceinline__ uint32_t rows() const { return rows_; }

private:
    uint32_t rows_;
    int lane_;
};

// A block of X times its B fragments, {b0, b1} of the block's two n tiles: into a block of Y, or on top of it.
__device__ __forceinline__ void multiply_block(float (&y)[2 * kBlocks][4], int out, bool first, const uint32_t (&a)[4],
                                               uint4 b) {
    if (first) {
        mma_16bit_first<Element>(y[2 * out], a, b.x, b.y);
        mma_16bit_first<Element>(y[2 * out + 1], a, b.z, b.w);
    } else {
        mma_16bit<Element>(y[2 * out], a, b.x, b.y);
        mma_16bit<Element>(y[2 * out + 1], a, b.z, b.w);
    }
}

// All threads of the CTA: asks for `kCount` B fragments in global memory. Returns where they will be for this lane.
template <int kCount>
__device__ __forceinline__ const uint4* request_fragments(const StoreSide& side, int head, int lane) {
    extern __shared__ uint4 shared[];
    const auto* source = reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(side.operand) +
                                                        head * side.operand_head_stride);
    for (int i = threadIdx.x; i < kCount; i += blockDim.x) cp_async_16(shared_address(shared + i), source + i);
    cp_async_commit();
    return shared + lane;
}

// T = H diag(gains) P: P reorders channels, gains carry signs, H is block diagonal with Sylvester-Hadamard blocks,
// H[m][k] = (-1)^popcount(m & k) within a block. Bits 0 to 3 of m and k are a product by matrix instructions, with one
// 16 x 16 matrix a block of channels, its gains in it; the higher bits are sums and differences of whole blocks of Y.
template <class Side>
struct RotationOperand {
    const uint4* fragments;  // [block][lane] -> {b0, b1} of the block's two n tiles
    const uint32_t* order;   // see Inbox::reorder; null to leave channels as they are

    __device__ RotationOperand(const StoreSide& side, int head, int lane)
        : fragments(request_fragments<kBlocks * kLanes>(side, head, lane)),
          order(side.order == nullptr ? nullptr : side.order + head * kBlocks * kLanes) {}

    __device__ __forceinline__ void multiply(float (&y)[2 * kBlocks][4], const Inbox& inbox) const {
        uint32_t x[kBlocks][4];
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) inbox.load(x[block], block);
        if (order != nullptr) inbox.reorder(x, order);
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
            multiply_block(y, block, true, x[block], fragments[block * kLanes]);
#pragma unroll
        for (int step = 1; step < kBlocks; step *= 2) {
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) {
                const int cls = Rotation<Side>::class_of(block), place = block - Side::first_channel(cls) / 16;
                if (step >= Rotation<Side>::order_blocks(cls) || (place & step) != 0) continue;
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    float &low = y[2 * block + i / 4][i % 4], &high = y[2 * (block + step) + i / 4][i % 4];
                    const float sum = low + high;
                    high = low - high;
                    low = sum;
                }
            }
        }
    }
};

// T as a matrix.
struct MatrixOperand {
    const uint4* fragments;  // [k block][n block][lane]

    __device__ MatrixOperand(const StoreSide& side, int head, int lane)
        : fragments(request_fragments<kBlocks * kBlocks * kLanes>(side, head, lane)) {}

    __device__ __forceinline__ void multiply(float (&y)[2 * kBlocks][4], const Inbox& inbox) const {
#pragma unroll
        for (int in = 0; in < kBlocks; ++in) {
            uint32_t a[4];
            inbox.load(a, in);
#pragma unroll
            for (int out = 0; out < kBlocks; ++out) {
                multiply_block(y, out, in == 0, a, fragments[(in * kBlocks + out) * kLanes]);
            }
        }
    }
};

// What a window has to do: at most one whole unit that starts in it, and the tokens of no whole unit.
struct Window {
    int unit_start;      // row of the window where a whole unit starts, or -1
    uint32_t scattered;  // rows of the window to store one by one, as a bit mask
    int64_t slot;        // of row `lane`, 32 of them: a whole unit may end in another window
};

__device__ __forceinline__ int64_t slot_of(const StoreParams& p, int token) {
    return token >= 0 && token < p.tokens ? __ldg(p.slot_mapping + token) : int64_t{-1};
}

// Warp-wide. Tokens t to t + 15 are a whole unit if slot t is a multiple of 16 and the next 15 follow on. `slot` is of
// row `lane` of 32.
__device__ __noinline__ Window survey_ragged(const StoreParams& p, int first, int64_t slot, int lane) {
    // Bit i of `high`: the token after first + i continues its slot. Of `low`: the same for first - 16 + i.
    const int64_t after = __shfl_down_sync(kFullWarp, slot, 1), start = __shfl_sync(kFullWarp, slot, 0);
    const uint32_t high = __ballot_sync(kFullWarp, slot >= 0 && lane < kLanes - 1 && after == slot + 1);
    // Slots of the window before matter only if the rest of a unit is here. Single tokens hardly ever wait for them.
    const uint32_t rest = (1u << (kUnitTokens - 1 - start % kUnitTokens)) - 1;
    const bool may_continue = start > 0 && start % kUnitTokens != 0 && (high & rest) == rest;
    int64_t before = __shfl_sync(kFullWarp, slot, lane % kRows);
    if (lane < kRows) before = may_continue ? slot_of(p, first - kRows + lane) : int64_t{-1};
    const int64_t after_before = __shfl_down_sync(kFullWarp, before, 1);
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
__device__ __forceinline__ Window survey(const StoreParams& p, int first, int64_t slot, int lane) {
    const int64_t start = __shfl_sync(kFullWarp, slot, 0);
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

__device__ __forceinline__ uint8_t* unit_address(const StoreParams& p, int64_t slot, int head) {
    const uint32_t unit = static_cast<uint32_t>(slot / kUnitTokens);
    const uint32_t page = p.page_shift >= 0 ? unit >> p.page_shift : unit / p.page_units;
    return p.cache + page * p.page_stride + head * p.head_stride +
           static_cast<int64_t>(unit - page * p.page_units) * CacheUnit::bytes;
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

// Y = X T^T - T mean, and the squared norm of each of the lane's rows and classes.
template <class Side, bool kIsKey, class Operand>
__device__ __forceinline__ void transform(float (&y)[2 * kBlocks][4], float (&square)[2][Side::classes],
                                          const StoreSide& side, const Operand& operand, const Inbox& inbox, int head,
                                          int lane) {
    operand.multiply(y, inbox);
    if (kIsKey && side.minus_mean != nullptr) {
        const float4* mean = reinterpret_cast<const float4*>(side.minus_mean + head * kHeadSize) + lane % 4;
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            const float4 start = __ldg(mean + 4 * block);
            const float four[2][2] = {{start.x, start.z}, {start.y, start.w}};  // [n tile][column 2 c, 2 c + 1]
#pragma unroll
            for (int i = 0; i < 8; ++i) y[2 * block + i / 4][i % 4] += four[i / 4][i % 2];
        }
    }
    for (auto& row : square)
        for (float& sum : row) sum = 0.f;
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
        const int cls = 8 * i < Side::channels(0) ? 0 : 1;
#pragma unroll
        for (int e = 0; e < 4; ++e) square[e / 2][cls] += y[i][e] * y[i][e];
    }
    for (auto& row : square)
        for (float& sum : row) sum = sum_of_four_lanes(sum);
}

// One class of channels to codes, a word of eight nibbles a block. Of keys: row g's four, row g + 8's four. Of values:
// for column 2 c, then 2 c + 1, n tile 0's rows g and g + 8, n tile 1's.
template <class Side, bool kIsKey, int cls>
__device__ __forceinline__ void quantize_class(uint32_t (&codes)[kBlocks], float (&scale)[2][Side::classes],
                                               const float (&y)[2 * kBlocks][4],
                                               const float (&square)[2][Side::classes], const StoreSide& side,
                                               int lane) {
    constexpr int kChannels = Side::channels(cls), kFirst = Side::first_channel(cls) / 16;
    using Q = Quantizer<Side::bits(cls)>;
    constexpr float kTiny = 1e-38f;
    float factor[2];
#pragma unroll
    for (int row = 0; row < 2; ++row)
        factor[row] = sqrtf(static_cast<float>(kChannels)) * rsqrtf(fmaxf(square[row][cls], kTiny));
    RowDots dots;
#pragma unroll
    for (int block = kFirst; block < kFirst + kChannels / 16; ++block) {
        QuantizedPair q[2][2];
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
            const float(&four)[4] = y[2 * block + tile];
            const __half2 low = __floats2half2_rn(four[0] * factor[0], four[1] * factor[0]);
            const __half2 high = __floats2half2_rn(four[2] * factor[1], four[3] * factor[1]);
            q[tile][0] = kIsKey && tile == 1 ? Q::template pair<true>(low) : Q::template pair<false>(low);
            q[tile][1] = !kIsKey || tile == 1 ? Q::template pair<true>(high) : Q::template pair<false>(high);
        }
        dots.add(q);
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
        // EDEN: |y|^2 / <y, levels>; the dot product still carries `factor` and the codebook's unit.
        const float numerator = square[row][cls] * factor[row] * Q::kUnit * side.output_scale[cls];
        scale[row][cls] = __fdividef(numerator, fmaxf(dots.row(row, lane), kTiny));
    }
}

// Y, a tile, to its slots. Row i of the tile is token first + i; `rows` says which there are, `slot` is lane i's.
template <class Side, bool kIsKey>
__device__ __forceinline__ void store_tile(const StoreParams& p, const StoreSide& side,
                                           const float (&y)[2 * kBlocks][4], float (&square)[2][Side::classes],
                                           const Inbox& inbox, int first, uint32_t rows, bool whole_unit, int64_t slot,
                                           int head, int lane) {
    constexpr float kLargest = 3.40282347e38f;
    const int g = lane / 4;
    bool finite[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float total = 0.f;
#pragma unroll
        for (int cls = 0; cls < Side::classes; ++cls) total += square[row][cls];
        finite[row] = total <= kLargest;
    }
    if (!__all_sync(kFullWarp, finite[0] && finite[1])) {
        // Scale 0: whatever its codes turn out to be, the vector is zero.
        uint32_t bad = 0u;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            if (!finite[row]) {
                for (float& s : square[row]) s = 0.f;
                bad |= 1u << (g + 8 * row);
            }
        }
        bad = __reduce_or_sync(kFullWarp, bad) & rows;
        if (lane == 0 && p.nonfinite != nullptr) atomicAdd(p.nonfinite, static_cast<unsigned long long>(__popc(bad)));
        if (p.hot_slots != nullptr) write_hot_rows(side, p, inbox.rows(), first, bad, true, head, lane);
    }

    uint32_t codes[kBlocks];
    float scale[2][Side::classes];
    quantize_class<Side, kIsKey, 0>(codes, scale, y, square, side, lane);
    if constexpr (Side::classes == 2) quantize_class<Side, kIsKey, 1>(codes, scale, y, square, side, lane);
    const uint16_t scales[2] = {scale_bytes(scale[0]), scale_bytes(scale[1])};
    if (whole_unit) {
        write_whole_unit<Side, kIsKey>(unit_address(p, __shfl_sync(kFullWarp, slot, 0), head), codes, scales, lane);
        return;
    }
#pragma unroll 1
    for (int row = 0; row < 2; ++row) {
        if ((rows >> 8 * row & 0xffu) == 0u) continue;
        const int64_t place = __shfl_sync(kFullWarp, slot, g + 8 * row);
        if ((rows >> (g + 8 * row) & 1u) == 0u) continue;
        write_token<Side, kIsKey>(unit_address(p, place, head), codes, row, static_cast<int>(place % kUnitTokens),
                                  row == 0 ? scales[0] : scales[1], lane);
    }
}

template <class Side, bool kIsKey, class Operand, bool kInTurns>
__device__ __forceinline__ void store_side(const StoreParams& p) {
    const StoreSide& side = p.sides[kIsKey ? 0 : 1];
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
    const int head = blockIdx.y;
    extern __shared__ uint8_t shared_bytes[];
    const bool any_matrix = p.sides[0].is_matrix || p.sides[1].is_matrix;
    uint8_t* inboxes = shared_bytes + (any_matrix ? kMatrixBytes : kRotationBytes);
    Inbox inbox(inboxes + warp * kWarpBytes, lane);

    // In turns: every gridDim.x-th window is the CTA's, and its warps take one after the other as they get done. The
    // scheduler favours some of them, and would leave the others' share to the end.
    const int windows = (p.tokens + p.window - 1) / p.window;
    int window = kInTurns ? warp * gridDim.x + blockIdx.x : blockIdx.x * warps + warp;
    int* taken = reinterpret_cast<int*>(inboxes + warps * kWarpBytes);
    if (kInTurns && threadIdx.x == 0) *taken = warps;
    // A window's rows are asked for before its slots are known: from where the previous one's unit started.
    int expected = 0;
    int64_t slot = -1;
    const Operand operand(side, head, lane);
    await_previous_kernel();  // so far only constants were read
    allow_next_kernel();
    if (window < windows) {
        inbox.request(side, p, window * p.window, head);
        slot = slot_of(p, window * p.window + lane);
    } else {
        cp_async_commit();  // so that every warp's operand is its last group but one
    }
    cp_async_wait<1>();
    __syncthreads();  // the operand's fragments, and `*taken`
    while (window < windows) {
        const int base = window * p.window;
        if constexpr (kInTurns) {
            int turn = 0;
            if (lane == 0) turn = atomicAdd(taken, 1);
            window = __shfl_sync(kFullWarp, turn, 0) * gridDim.x + blockIdx.x;
        } else {
            window += gridDim.x * warps;
        }
        const int next = window * p.window;
        const Window work = survey(p, base, slot, lane);
        if (next < p.tokens) slot = slot_of(p, next + lane);
        bool whole = work.unit_start >= 0;
        int start = whole ? work.unit_start : 0;
        inbox.await();
        if (start != expected) {
            inbox.request(side, p, base + start, head);
            inbox.await();
            expected = start;
        }
        bool again;
        do {  // at most twice; a loop, so that there is one copy of the code for both kinds of tile: it is long
            const uint32_t rows = whole ? 0xffffu : work.scattered;
            if (p.hot_slots != nullptr) write_hot_rows(side, p, inbox.rows(), base + start, rows, false, head, lane);
            float y[2 * kBlocks][4], square[2][Side::classes];
            transform<Side, kIsKey>(y, square, side, operand, inbox, head, lane);
            again = whole && work.scattered != 0u;
            if (again || next < p.tokens) inbox.request(side, p, again ? base : next + expected, head);
            const int64_t row_slot = __shfl_sync(kFullWarp, work.slot, start + lane % kRows);
            store_tile<Side, kIsKey>(p, side, y, square, inbox, base + start, rows, whole, row_slot, head, lane);
            if (again) inbox.await();
            whole = false;
            start = 0;
        } while (again);
    }
}

// Grid: x shares out windows, y is the KV head, z the side.
template <int kMostWarps, bool kMayBeMatrix>
__global__ void __launch_bounds__(kMostWarps* kLanes, kWarpsPerProcessor / kMostWarps)
    store_kernel(const __grid_constant__ StoreParams p) {
    using Key = CacheUnit::Key;
    using Value = CacheUnit::Value;
    if (blockIdx.z == 0) {
        if (kMayBeMatrix && p.sides[0].is_matrix)
            store_side<Key, true, MatrixOperand, kMayBeMatrix>(p);
        else
            store_side<Key, true, RotationOperand<Key>, kMayBeMatrix>(p);
    } else {
        if (kMayBeMatrix && p.sides[1].is_matrix)
            store_side<Value, false, MatrixOperand, kMayBeMatrix>(p);
        else
            store_side<Value, false, RotationOperand<Value>, kMayBeMatrix>(p);
    }
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <int kMostWarps, bool kMayBeMatrix>
cudaError_t launch(StoreParams p, cudaStream_t stream) {
    const auto kernel = store_kernel<kMostWarps, kMayBeMatrix>;
    constexpr int kOperand = kMayBeMatrix ? kMatrixBytes : kRotationBytes;
    int device = 0, processors = 0, most_shared = 0, resident = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status != cudaSuccess) return status;
    const int fitting = (most_shared - kOperand - kCounterBytes) / kWarpBytes;
    if (fitting < 1) return cudaErrorInvalidConfiguration;  // Python says so before it comes to this
    // A few tokens are better spread over the processors: one by one they take long to write.
    const int pairs = 2 * p.kv_heads;  // of head and side
    for (p.window = kRows; p.window > kLeastWindow && 2 * ceil_div(p.tokens, p.window) * pairs <= processors;)
        p.window /= 2;
    const int windows = ceil_div(p.tokens, p.window);
    const int warps = std::min({std::max(1, windows * pairs / processors), kMostWarps, fitting});
    const int shared = kOperand + warps * kWarpBytes + kCounterBytes;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (status == cudaSuccess)
        status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, warps * kLanes, shared);
    if (status != cudaSuccess) return status;
    // No more CTAs than run at once: then a warp always has its next tile on the way, and fragments are loaded once.
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

cudaError_t launch_store(const StoreParams& p, cudaStream_t stream) {
    if (p.tokens == 0) return cudaSuccess;
    return p.sides[0].is_matrix || p.sides[1].is_matrix ? launch<kMatrixWarps, true>(p, stream)
                                                        : launch<kWarps, false>(p, stream);
}

}  // namespace mq
