// Store: new keys and values to codes in their pages, in one launch.
//
// A warp takes 16 tokens of one KV head and one side through all of it, in registers:
//
//   1. Load X, 16 tokens x head size, straight into the A fragments of mma.m16n8k16.
//   2. Y = X T^T on the tensor cores. A rotation needs no matrix in memory: its B fragments are +-1, known from the
//      lane. A calibrated transform is a matrix in shared memory. The key mean is the accumulators' start, -T mean.
//   3. Norms by two shuffles among the four lanes of a token; then codes and EDEN scales, block by block of 16
//      channels. Y waits in shared memory, each lane's own, so that this is a loop: unrolled over registers it was 25
//      KB of instructions, and warps waited for those more than for anything else.
//   4. Pack and write. The columns of T are dealt to fragments so that a lane ends up with exactly the channels that
//      the page wants it to own: keys need no exchange at all, values one 8 x 8 transposition of codes.
//
// Which 16 tokens? A window is 16 consecutive entries of slot_mapping. Tokens that fill a whole unit, in order (the
// engine's order inside a prefill chunk), are taken unit by unit by the window where the unit starts, and their unit
// is written with plain vector stores. All others (decode steps, the ragged ends of chunks) are rows of the window as
// they come, from any units; a token's bits then go in by atomic AND and OR of disjoint masks. So warps that write to
// the same word never lose each other's bits, in whatever order the tokens are listed. Only a slot listed twice in
// one call gets a mix of both tokens; no other token is touched.
//
// Codes equal those of manthanquant.quantize except near a decision boundary (store_quantize.cuh); tests hold them to
// the tolerance in manthanquant/cuda/store.py. A vector with NaN or an infinity gets scale 0 and is counted; it stays
// in its own row of the matrix product.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

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
constexpr int kChunk = 4;                // blocks of Y in registers at a time
constexpr int kWindow = 16;              // tokens a warp looks at

constexpr int kWarps = 4;                                     // of a CTA
constexpr int kMatrixWarps = kHeadSize > 128 ? 4 : 8;         // share a matrix in shared memory, if they fit
constexpr int kWarpsPerProcessor = kHeadSize > 128 ? 8 : 16;  // what registers allow
constexpr int kWarpBytes = kBlocks * 2 * kLanes * sizeof(float4);  // Y of a warp
constexpr int kMatrixBytes = kHeadSize * kHeadSize * 2;

// The channel, in a block of 16, of column n (0..7) of the block's n tile 0 or 1. Keys: the lane that holds columns
// 2 c and 2 c + 1 of both tiles gets channels 4 c to 4 c + 3. Values: as they come.
template <bool kIsKey>
__device__ constexpr int output_channel(int tile, int column) {
    return kIsKey ? 4 * (column / 2) + 2 * tile + column % 2 : 8 * tile + column;
}

// X's k tile is dealt so that lane c loads channels 4 c to 4 c + 3 of the block at once: k = 2 c + e + 8 h is channel
// 4 c + 2 h + e.

// T = H diag(signs): the signs flip X. Four fragments and their negatives are all there is (rotation.cuh).
template <class Side, bool kIsKey>
struct RotationOperand {
    uint32_t fragments[2][2];  // [n tile of a pair][register]
    const uint2* signs;

    __device__ RotationOperand(const StoreSide& side, int, int lane) {
        const int g = lane / 4, c = lane % 4;
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
            const int out = output_channel<kIsKey>(tile, g);
#pragma unroll
            for (int h = 0; h < 2; ++h) fragments[tile][h] = rotation_pair<Element>(4 * c + 2 * h, out);
        }
        signs = static_cast<const uint2*>(side.operand) + c;
    }

    // Adds Y's blocks [kFirst, kFirst + kCount) to `y`.
    template <int kFirst, int kCount>
    __device__ __forceinline__ void multiply(float (&y)[2 * kCount][4], const uint32_t (&x)[kBlocks][4]) const {
#pragma unroll
        for (int in = 0; in < kBlocks; ++in) {
            const uint2 flip = __ldg(signs + 4 * in);
            const uint32_t a[4] = {x[in][0] ^ flip.x, x[in][1] ^ flip.x, x[in][2] ^ flip.y, x[in][3] ^ flip.y};
#pragma unroll
            for (int out = 0; out < kCount; ++out) {
                if (!Rotation<Side>::mixes(in, kFirst + out)) continue;
                const uint32_t negate = Rotation<Side>::negates(in, kFirst + out) ? kSignBits : 0u;
                mma_16bit<Element>(y[2 * out], a, fragments[0][0] ^ negate, fragments[0][1] ^ negate);
                mma_16bit<Element>(y[2 * out + 1], a, fragments[1][0] ^ negate, fragments[1][1] ^ negate);
            }
        }
    }
};

// T as a matrix, in shared memory in fragment order: [k tile][n tile pair][lane] -> {b0, b1} of the pair's two tiles.
struct MatrixOperand {
    const uint4* fragments;
    uint32_t zero;

    // All threads of the CTA: brings the head's matrix into shared memory.
    __device__ MatrixOperand(const StoreSide& side, int head, int lane) : zero(side.zero) {
        extern __shared__ uint4 shared[];  // the matrix first, then the warps' Y
        constexpr int kCount = kBlocks * kBlocks * kLanes;
        const uint4* matrix = reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(side.operand) +
                                                             head * side.operand_head_stride);
        for (int i = threadIdx.x; i < kCount; i += blockDim.x)
            __pipeline_memcpy_async(shared + i, matrix + i, sizeof(uint4));
        __pipeline_commit();
        __pipeline_wait_prior(0);
        __syncthreads();
        fragments = shared + lane;
    }

    template <int kFirst, int kCount>
    __device__ __forceinline__ void multiply(float (&y)[2 * kCount][4], const uint32_t (&x)[kBlocks][4]) const {
#pragma unroll
        for (int in = 0; in < kBlocks; ++in) {
            // Loads put registers side by side that the instruction does not want so. This orders them once; left to
            // itself the compiler copies them before almost every instruction.
            const uint32_t a[4] = {x[in][0] ^ zero, x[in][1] ^ zero, x[in][2] ^ zero, x[in][3] ^ zero};
#pragma unroll
            for (int out = 0; out < kCount; ++out) {
                const uint4 b = fragments[(in * kBlocks + kFirst + out) * kLanes];
                mma_16bit<Element>(y[2 * out], a, b.x, b.y);
                mma_16bit<Element>(y[2 * out + 1], a, b.z, b.w);
            }
        }
    }
};

// 16 rows of a warp: consecutive tokens, and where each is stored. A lane knows its rows g and g + 8.
struct Tile {
    bool whole_unit;  // the rows are the 16 tokens of one unit, in order
    int token[2];
    int64_t slot[2];  // below 0: no such row
};

// What a window has to do: at most one whole unit that starts in it, and the tokens of no whole unit.
struct Window {
    int unit_start;      // row (0..15) where a whole unit starts, or -1
    uint32_t scattered;  // rows of the window to store one by one, as a bit mask
    int64_t slot;        // of row `lane`, 32 of them: a whole unit may end in the next window
};

__device__ __forceinline__ int64_t slot_of(const StoreParams& p, int token) {
    return token >= 0 && token < p.tokens ? __ldg(p.slot_mapping + token) : int64_t{-1};
}

// Warp-wide. Tokens t to t + 15 are a whole unit if slot t is a multiple of 16 and the next 15 follow on. `slot` is of
// row `lane` of 32.
__device__ __noinline__ Window survey_ragged(const StoreParams& p, int first, int64_t slot, int lane) {
    const int64_t before = slot_of(p, first - kWindow + lane);
    int64_t after_before = __shfl_down_sync(kFullWarp, before, 1), after_slot = __shfl_down_sync(kFullWarp, slot, 1);
    const int64_t middle = __shfl_sync(kFullWarp, slot, kWindow);
    if (lane == kLanes - 1) after_before = middle, after_slot = -1;
    // Bit i of `follows`: the token after first - 16 + i continues its slot.
    const uint32_t low = __ballot_sync(kFullWarp, before >= 0 && after_before == before + 1);
    const uint32_t high = __ballot_sync(kFullWarp, slot >= 0 && after_slot == slot + 1) >> kWindow;
    const uint64_t follows = low | static_cast<uint64_t>(high) << 32;
    constexpr uint32_t kRun = (1u << (kUnitTokens - 1)) - 1;
    const bool starts = before >= 0 && before % kUnitTokens == 0 && (follows >> lane & kRun) == kRun;
    const uint32_t start_mask = __ballot_sync(kFullWarp, starts);  // of tokens first - 16 to first + 15
    const bool in_unit = (start_mask >> (lane + 1) & 0xffffu) != 0;  // for lane < 16: is token first + lane covered?
    const uint32_t scattered = __ballot_sync(kFullWarp, lane < kWindow && slot >= 0 && !in_unit);
    const uint32_t here = start_mask >> kWindow;
    return {here ? __ffs(here) - 1 : -1, scattered, slot};
}

// The same, by a short cut for a window that is one whole unit, as inside a long chunk.
__device__ __forceinline__ Window survey(const StoreParams& p, int first, int lane) {
    const int64_t slot = slot_of(p, first + lane);
    const int64_t start = __shfl_sync(kFullWarp, slot, 0);
    const bool in_place = lane >= kWindow || slot == start + lane;
    if (start >= 0 && start % kUnitTokens == 0 && __all_sync(kFullWarp, in_place)) return {0, 0u, slot};
    return survey_ragged(p, first, slot, lane);
}

// The lane's rows, tokens first + g and first + g + 8, as A fragments. Past the last token it is loaded again, which
// costs nothing; such rows have no slot.
__device__ __forceinline__ void load_rows(uint32_t (&x)[kBlocks][4], const StoreSide& side, const StoreParams& p,
                                          int first, int head, int lane) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const int token = min(first + lane / 4 + 8 * row, p.tokens - 1);
        const auto* line = static_cast<const Element*>(side.input) + token * side.token_stride +
                           head * side.head_stride + 4 * (lane % 4);
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            const uint2 four = __ldg(reinterpret_cast<const uint2*>(line + 16 * block));
            x[block][row] = four.x;  // registers of the A fragment: {row g, g + 8} x {k, k + 8}
            x[block][row + 2] = four.y;
        }
    }
}

__device__ __forceinline__ uint32_t to_bf16_pair(uint32_t pair) {
    if constexpr (std::is_same_v<Element, __nv_bfloat16>) return pair;
    const float2 wide = __half22float2(*reinterpret_cast<const __half2*>(&pair));
    const __nv_bfloat162 narrow = __floats2bfloat162_rn(wide.x, wide.y);
    return *reinterpret_cast<const uint32_t*>(&narrow);
}

// Calls `body(row, line)` for each row of the tile that has a hot slot; `line` is where the lane's channels of it go.
template <class Body>
__device__ __forceinline__ void for_hot_rows(const StoreSide& side, const StoreParams& p, const Tile& tile, int head,
                                             int lane, Body body) {
    if (p.hot_slots == nullptr) return;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const int64_t place = tile.slot[row] < 0 ? -1 : __ldg(p.hot_slots + tile.token[row]);
        if (place < 0) continue;
        const int64_t vector = (place / kUnitTokens * p.kv_heads + head) * kUnitTokens + place % kUnitTokens;
        body(row, static_cast<__nv_bfloat16*>(side.hot_pool) + vector * kHeadSize + 4 * (lane % 4));
    }
}

__device__ __forceinline__ uint8_t* unit_address(const StoreParams& p, int64_t slot, int head) {
    const uint32_t unit = static_cast<uint32_t>(slot / kUnitTokens);
    const uint32_t page = p.page_shift >= 0 ? unit >> p.page_shift : unit / p.page_units;
    return p.cache + page * p.page_stride + head * p.head_stride +
           static_cast<int64_t>(unit - page * p.page_units) * CacheUnit::bytes;
}

// Codes back from shared memory, in the page's order of registers.
template <class Side, bool kIsKey>
__device__ __forceinline__ void gather_codes(uint32_t (&codes)[2 * kBlocks], const float4* parked) {
#pragma unroll
    for (int cls = 0; cls < Side::classes; ++cls) {
        const int blocks = Side::channels(cls) / 16, first = Side::first_channel(cls) / 16;
#pragma unroll
        for (int block = 0; block < blocks; ++block) {
            const uint2 pair = *reinterpret_cast<const uint2*>(parked + 2 * (first + block) * kLanes);
            codes[2 * first + (kIsKey ? block : 2 * block)] = pair.x;
            codes[2 * first + (kIsKey ? blocks + block : 2 * block + 1)] = pair.y;
        }
    }
}

template <class Side, bool kIsKey>
__device__ __forceinline__ void write_whole_unit(uint8_t* unit, const float4* parked, const uint16_t (&scales)[2],
                                                 int lane) {
    uint32_t registers[2 * kBlocks];  // of the page, each four codes as bytes
    gather_codes<Side, kIsKey>(registers, parked);
    if constexpr (!kIsKey) {
#pragma unroll
        for (uint32_t& codes : registers) codes = transpose_8x8(codes);
    }
    uint32_t words[Side::words];
    pack_words<Side>(words, registers);
    store_words(words, unit + (kIsKey ? 0 : CacheUnit::value_offset), lane);
    if (lane % 4 == 0)
        *reinterpret_cast<uint32_t*>(unit + CacheUnit::scale_offset + scale_place(kIsKey ? 0 : 1, lane / 4)) =
            scales[0] | static_cast<uint32_t>(scales[1]) << 16;
}

// One token of a tile (the lane's row g or g + 8) into its unit. Not inlined: it would cost every tile its registers.
template <class Side, bool kIsKey>
__device__ __noinline__ void write_token(uint8_t* unit, const float4* parked, int row, int token, uint16_t scales,
                                         int lane) {
    uint32_t codes[2 * kBlocks];
    gather_codes<Side, kIsKey>(codes, parked);
    if constexpr (kIsKey) {
        scatter_key_row<Side>(codes, row, unit, token, lane % 4);
    } else {
        scatter_value_row<Side>(codes, row, unit + CacheUnit::value_offset, token, lane % 4);
    }
    if (lane % 4 == 0)
        *reinterpret_cast<uint16_t*>(unit + CacheUnit::scale_offset + scale_place(kIsKey ? 0 : 1, token)) = scales;
}

// Blocks [kFirst, kFirst + kCount) of Y to shared memory, and their share of the squared norms.
template <class Side, bool kIsKey, int kFirst, int kCount, class Operand>
__device__ __forceinline__ void transform_blocks(float4* parked, float (&square)[2][Side::classes],
                                                 const StoreSide& side, const Operand& operand,
                                                 const uint32_t (&x)[kBlocks][4], int head, int lane) {
    float y[2 * kCount][4] = {};
    if (kIsKey && side.minus_mean != nullptr) {
#pragma unroll
        for (int block = 0; block < kCount; ++block) {
            const float* mean = side.minus_mean + head * kHeadSize + 16 * (kFirst + block);
            const float4 start = __ldg(reinterpret_cast<const float4*>(mean) + lane % 4);
            y[2 * block][0] = y[2 * block][2] = start.x;
            y[2 * block][1] = y[2 * block][3] = start.y;
            y[2 * block + 1][0] = y[2 * block + 1][2] = start.z;
            y[2 * block + 1][1] = y[2 * block + 1][3] = start.w;
        }
    }
    operand.template multiply<kFirst, kCount>(y, x);
#pragma unroll
    for (int i = 0; i < 2 * kCount; ++i) {
        const int cls = 16 * kFirst + 8 * i < Side::channels(0) ? 0 : 1;
#pragma unroll
        for (int e = 0; e < 4; ++e) square[e / 2][cls] += y[i][e] * y[i][e];
        parked[(2 * kFirst + i) * kLanes] = make_float4(y[i][0], y[i][1], y[i][2], y[i][3]);
    }
}

template <class Side, bool kIsKey, int kFirst, class Operand>
__device__ __forceinline__ void transform_from(float4* parked, float (&square)[2][Side::classes],
                                               const StoreSide& side, const Operand& operand,
                                               const uint32_t (&x)[kBlocks][4], int head, int lane) {
    if constexpr (kFirst < kBlocks) {
        constexpr int kCount = kBlocks - kFirst < kChunk ? kBlocks - kFirst : kChunk;
        transform_blocks<Side, kIsKey, kFirst, kCount>(parked, square, side, operand, x, head, lane);
        transform_from<Side, kIsKey, kFirst + kCount>(parked, square, side, operand, x, head, lane);
    }
}

// One class of channels to codes, which replace Y in shared memory: two words a block, each four codes as bytes. Of
// keys: row g's, row g + 8's. Of values: n tile 0's, n tile 1's, as {row g, row g + 8} of column 2 c, then 2 c + 1.
template <class Side, bool kIsKey, int cls>
__device__ __forceinline__ void quantize_class(float4* parked, float (&scale)[2][Side::classes],
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
#pragma unroll 1
    for (int block = kFirst; block < kFirst + kChannels / 16; ++block) {
        QuantizedPair q[2][2];
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
            const float4 y = parked[(2 * block + tile) * kLanes];
            q[tile][0] = Q::pair(__floats2half2_rn(y.x * factor[0], y.y * factor[0]));
            q[tile][1] = Q::pair(__floats2half2_rn(y.z * factor[1], y.w * factor[1]));
        }
        dots.add(q);
        uint2 codes;
        if constexpr (kIsKey) {
            codes = make_uint2(Q::codes(q[0][0].code, q[1][0].code), Q::codes(q[0][1].code, q[1][1].code));
        } else {
            codes = make_uint2(__byte_perm(Q::codes(q[0][0].code, q[0][1].code), 0u, 0x3120u),
                               __byte_perm(Q::codes(q[1][0].code, q[1][1].code), 0u, 0x3120u));
        }
        *reinterpret_cast<uint2*>(parked + 2 * block * kLanes) = codes;
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        // EDEN: |y|^2 / <y, levels>; the dot product still carries `factor` and the codebook's unit.
        const float numerator = square[row][cls] * factor[row] * Q::kUnit * side.output_scale[cls];
        scale[row][cls] = __fdividef(numerator, fmaxf(dots.row(row, lane), kTiny));
    }
}

template <class Side, bool kIsKey, class Operand>
__device__ __forceinline__ void store_tile(const StoreParams& p, const StoreSide& side, const Operand& operand,
                                           float4* parked, const uint32_t (&x)[kBlocks][4], const Tile& tile, int head,
                                           int lane) {
    constexpr float kLargest = 3.40282347e38f;
    for_hot_rows(side, p, tile, head, lane, [&](int row, __nv_bfloat16* line) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
            *reinterpret_cast<uint2*>(line + 16 * block) =
                make_uint2(to_bf16_pair(x[block][row]), to_bf16_pair(x[block][row + 2]));
    });

    float square[2][Side::classes] = {};
    transform_from<Side, kIsKey, 0>(parked, square, side, operand, x, head, lane);
    bool finite[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float total = 0.f;
#pragma unroll
        for (int cls = 0; cls < Side::classes; ++cls) total += square[row][cls] = sum_of_four_lanes(square[row][cls]);
        finite[row] = total <= kLargest;
    }
    if (!(finite[0] && finite[1])) {
        // Scale 0: whatever its codes turn out to be, the vector is zero.
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            if (finite[row]) continue;
            for (float& s : square[row]) s = 0.f;
            if (tile.slot[row] >= 0 && lane % 4 == 0 && p.nonfinite != nullptr) atomicAdd(p.nonfinite, 1ull);
        }
        for_hot_rows(side, p, tile, head, lane, [&](int row, __nv_bfloat16* line) {
            if (finite[row]) return;
            for (int block = 0; block < kBlocks; ++block)
                *reinterpret_cast<uint2*>(line + 16 * block) = make_uint2(0u, 0u);
        });
    }

    float scale[2][Side::classes];
    quantize_class<Side, kIsKey, 0>(parked, scale, square, side, lane);
    if constexpr (Side::classes == 2) quantize_class<Side, kIsKey, 1>(parked, scale, square, side, lane);
    const uint16_t scales[2] = {scale_bytes(scale[0]), scale_bytes(scale[1])};
    if (tile.whole_unit) {
        write_whole_unit<Side, kIsKey>(unit_address(p, tile.slot[0], head), parked, scales, lane);
        return;
    }
#pragma unroll 1
    for (int row = 0; row < 2; ++row) {
        const int64_t slot = row == 0 ? tile.slot[0] : tile.slot[1];
        if (slot < 0) continue;
        write_token<Side, kIsKey>(unit_address(p, slot, head), parked, row, static_cast<int>(slot % kUnitTokens),
                                  row == 0 ? scales[0] : scales[1], lane);
    }
}

template <class Side, bool kIsKey, class Operand>
__device__ __forceinline__ void store_side(const StoreParams& p) {
    const StoreSide& side = p.sides[kIsKey ? 0 : 1];
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
    const int head = blockIdx.y, g = lane / 4;
    const Operand operand(side, head, lane);
    // Behind the matrix, if either side has one: then all CTAs have room for it.
    extern __shared__ float4 shared_y[];
    const bool any_matrix = p.sides[0].is_matrix || p.sides[1].is_matrix;
    float4* parked = shared_y + ((any_matrix ? kMatrixBytes : 0) + warp * kWarpBytes) / sizeof(float4) + lane;
    const int windows = (p.tokens + kWindow - 1) / kWindow;
    for (int window = blockIdx.x * warps + warp; window < windows; window += gridDim.x * warps) {
        const int first = window * kWindow;
        uint32_t x[kBlocks][4];
        load_rows(x, side, p, first, head, lane);  // before their slots are known: most often these are the rows
        const Window work = survey(p, first, lane);
        bool whole = work.unit_start >= 0;
        if (!whole && work.scattered == 0u) continue;
        if (whole && work.unit_start > 0) load_rows(x, side, p, first + work.unit_start, head, lane);
        while (true) {  // a loop, so that there is one copy of the code for both kinds of tile: it is long
            const int start = whole ? work.unit_start : 0;
            Tile tile{whole};
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const int64_t slot = __shfl_sync(kFullWarp, work.slot, start + g + 8 * row);
                const bool present = whole || (work.scattered >> (g + 8 * row) & 1u);
                tile.token[row] = first + start + g + 8 * row;
                tile.slot[row] = present ? slot : -1;
            }
            store_tile<Side, kIsKey>(p, side, operand, parked, x, tile, head, lane);
            if (!whole || work.scattered == 0u) break;
            whole = false;
            load_rows(x, side, p, first, head, lane);
        }
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
            store_side<Key, true, MatrixOperand>(p);
        else
            store_side<Key, true, RotationOperand<Key, true>>(p);
    } else {
        if (kMayBeMatrix && p.sides[1].is_matrix)
            store_side<Value, false, MatrixOperand>(p);
        else
            store_side<Value, false, RotationOperand<Value, false>>(p);
    }
}

int windows_of(const StoreParams& p) { return (p.tokens + kWindow - 1) / kWindow; }

cudaError_t launch_rotations(const StoreParams& p, cudaStream_t stream) {
    const auto kernel = store_kernel<kWarps, false>;
    const int warps = std::min(windows_of(p), kWarps), bytes = warps * kWarpBytes;
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return status;
    const dim3 grid((windows_of(p) + warps - 1) / warps, p.kv_heads, 2);
    kernel<<<grid, warps * kLanes, bytes, stream>>>(p);
    return cudaGetLastError();
}

cudaError_t launch_with_matrix(const StoreParams& p, cudaStream_t stream) {
    const auto kernel = store_kernel<kMatrixWarps, true>;
    int device = 0, processors = 0, most_shared = 0, resident = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status != cudaSuccess) return status;
    const int fitting = (most_shared - kMatrixBytes) / kWarpBytes;
    if (fitting < 1) return cudaErrorInvalidConfiguration;  // Python says so before it comes to this
    const int warps = std::min({windows_of(p), kMatrixWarps, fitting});
    const int bytes = kMatrixBytes + warps * kWarpBytes;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status == cudaSuccess)
        status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, warps * kLanes, bytes);
    if (status != cudaSuccess) return status;
    // A CTA that holds a matrix keeps it for many windows: no more CTAs than run at once.
    const int most = processors * resident / (2 * p.kv_heads), wanted = (windows_of(p) + warps - 1) / warps;
    const dim3 grid(std::min(wanted, std::max(most, 1)), p.kv_heads, 2);
    kernel<<<grid, warps * kLanes, bytes, stream>>>(p);
    return cudaGetLastError();
}

}  // namespace

cudaError_t launch_store(const StoreParams& p, cudaStream_t stream) {
    if (p.tokens == 0) return cudaSuccess;
    return p.sides[0].is_matrix || p.sides[1].is_matrix ? launch_with_matrix(p, stream) : launch_rotations(p, stream);
}

}  // namespace mq
