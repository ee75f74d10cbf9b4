// Prefix: cached tokens back to the keys and values that the model made, for dense attention to read.
//
// The store's mirror image. A warp takes a unit (16 tokens of one KV head) and one side through all of it, in
// registers:
//
//   1. Load the lane's words and permute bytes to levels, as decode attention does (decode_codes.cuh).
//   2. Levels to the A fragments of mma.m16n8k16: small integers, exact in fp16. Key registers are rows of tokens
//      already; value registers are rows of channels, and one 8 x 8 transposition turns them.
//   3. X = Y T^-T on the tensor cores. A rotation needs no matrix in memory (rotation.cuh), and its sums are exact. A
//      dense transform is a matrix in shared memory.
//   4. Scales, which belong to rows, and what belongs to channels (norm, sign, 1 / gain, key mean) in fp32; then round
//      once and write. The columns of T^-1 are dealt so that a lane ends up with four consecutive channels of a block.
//      A gain's channels go to their places by way of shared memory.
//
// Units that the exact tier holds are copied from it, and so are the chunk's own tokens behind the prefix, so that one
// dense call sees both. Per token and head 100 bytes are read and 512 written (k3v3, D = 128).
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include <algorithm>
#include <type_traits>

#include "codebook.h"
#include "decode_codes.cuh"
#include "layout.h"
#include "prefix.h"
#include "ptx.cuh"
#include "rotation.cuh"

namespace mq {
namespace {

using Element = MQ_PREFIX_ELEMENT;  // __nv_bfloat16 or __half
using CacheUnit = Unit<MQ_FORMAT, MQ_HEAD_SIZE>;

constexpr int kHeadSize = MQ_HEAD_SIZE;
constexpr int kBlocks = kHeadSize / 16;  // blocks of 16 channels: k tiles of Y, pairs of n tiles of X
constexpr int kWarps = 4;                // of a CTA
constexpr int kMatrixWarps = 8;          // share a matrix in shared memory
// What registers allow.
constexpr int warps_per_processor(bool may_be_matrix) { return kHeadSize > 128 ? 8 : may_be_matrix ? 16 : 20; }
constexpr int kMatrixBytes = kHeadSize * kHeadSize * 2;
constexpr int kVectors = kHeadSize / 8;  // 16-byte vectors of a row

// Where the channels of a block of 16 lie in A's k: k = 2 c + e + 8 h is this channel plus e. Keys: as the page deals
// them, lane c's four bytes. Values: as they come.
template <bool kIsKey>
__device__ constexpr int input_channel(int h, int c) {
    return kIsKey ? 4 * c + 2 * h : 2 * c + 8 * h;
}

// The channel, in a block of 16, of column n (0..7) of the block's n tile 0 or 1: lane c, which gets columns 2 c and
// 2 c + 1 of both, has channels 4 c to 4 c + 3.
__device__ constexpr int output_channel(int tile, int column) { return 4 * (column / 2) + 2 * tile + column % 2; }

// Sums over one block of output channels: [n tile][C register]. A matrix mixes the classes of channels, whose scales
// differ, so it has sums for each.
template <int kClasses>
using Sums = float[kClasses][2][4];

// T^-1 is a rotation, then factors and places of channels, which are not applied here. H of order 16 n is
// H_n (x) H_16: first sums and differences of whole blocks, then one 16 x 16 fragment for all. Levels are small
// integers (4 bits: halves), and so are their sums: both steps are exact, in fp16 and in the accumulator.
template <class Side, bool kIsKey>
struct RotationOperand {
    static constexpr int classes = 1;  // an output channel sees one class
    static constexpr int unroll = kBlocks;
    uint32_t fragments[2][2];  // [n tile][register]

    __device__ RotationOperand(const PrefixSide&, int, int lane) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
            for (int h = 0; h < 2; ++h)
                fragments[tile][h] =
                    rotation_pair<__half>(input_channel<kIsKey>(h, lane % 4), output_channel(tile, lane / 4));
        }
    }

    __device__ __forceinline__ void prepare(uint32_t (&y)[kBlocks][4]) const {
#pragma unroll
        for (int distance = 1; distance < kBlocks; distance *= 2) {
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) {
                if (!Rotation<Side>::pairs(block, distance)) continue;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const __half2 a = half2_of(y[block][i]), b = half2_of(y[block + distance][i]);
                    y[block][i] = bits_of(__hadd2(a, b)), y[block + distance][i] = bits_of(__hsub2(a, b));
                }
            }
        }
    }

    __device__ __forceinline__ void multiply(Sums<1>& sums, const uint32_t (&y)[kBlocks][4], int out) const {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile)
            mma_16bit<__half>(sums[0][tile], y[out], fragments[tile][0], fragments[tile][1]);
    }
};

// Any T^-1, in shared memory in fragment order: [k tile][n tile pair][lane] -> {b0, b1} of the pair's two tiles.
template <class Side>
struct MatrixOperand {
    static constexpr int classes = Side::classes;
    static constexpr int unroll = 1;  // blocks of output: a longer loop does not fit the instruction cache
    const uint4* fragments;

    // All threads of the CTA: brings the head's matrix into shared memory.
    __device__ MatrixOperand(const PrefixSide& side, int head, int lane) {
        extern __shared__ uint4 shared[];
        const uint4* matrix = reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(side.matrix) +
                                                             head * side.matrix_head_stride);
        for (int i = threadIdx.x; i < kBlocks * kBlocks * kLanes; i += blockDim.x)
            __pipeline_memcpy_async(shared + i, matrix + i, sizeof(uint4));
        __pipeline_commit();
        __pipeline_wait_prior(0);
        __syncthreads();
        fragments = shared + lane;
    }

    __device__ __forceinline__ void prepare(uint32_t (&)[kBlocks][4]) const {}

    __device__ __forceinline__ void multiply(Sums<classes>& sums, const uint32_t (&y)[kBlocks][4], int out) const {
#pragma unroll
        for (int in = 0; in < kBlocks; ++in) {
            const int cls = Rotation<Side>::class_of(in);
            const uint4 b = fragments[(in * kBlocks + out) * kLanes];
            mma_16bit<__half>(sums[cls][0], y[in], b.x, b.y);
            mma_16bit<__half>(sums[cls][1], y[in], b.z, b.w);
        }
    }
};

// Two of a register's four elements as levels in fp16; `selector` picks them (PRMT: one byte each, 4 the constant).
template <int kBits>
__device__ __forceinline__ uint32_t levels(uint32_t elements, uint32_t selector) {
    // 0x6400 | byte is 1024 + byte.
    constexpr uint32_t kBase = 0x64646464u;
    constexpr bool kSigned = kTwiceElementOffset<kBits> == 0;
    const uint32_t biased = prmt(kSigned ? elements ^ 0x80808080u : elements, kBase, selector);
    __half2 level = __hsub2(half2_of(biased), __float2half2_rn(kSigned ? 1152.f : 1024.f));
    // In two steps: 1024 plus a half is no fp16.
    if constexpr (!kSigned) level = __hsub2(level, __float2half2_rn(0.5f * kTwiceElementOffset<kBits>));
    return bits_of(level);
}

// One class of a lane's words to A fragments, [block][register].
template <class Side, bool kIsKey, int cls>
__device__ __forceinline__ void decode_class(uint32_t (&y)[kBlocks][4], const uint32_t (&words)[Side::words],
                                             const Decoder& decoder) {
    constexpr int kBits = Side::bits(cls), kRegisters = Side::registers(cls), kInBlocks = kRegisters / 2;
    constexpr int kFirst = Side::first_channel(cls) / 16;
    uint32_t elements[kRegisters];
    decoder.template registers<kBits, kRegisters, 0, kRegisters>(words + Side::first_word(cls), elements);
#pragma unroll
    for (int block = 0; block < kInBlocks; ++block) {
        uint32_t(&a)[4] = y[kFirst + block];
        if constexpr (kIsKey) {  // a register is a row's channels 4 c to 4 c + 3
            const uint32_t low = elements[block], high = elements[kInBlocks + block];
            a[0] = levels<kBits>(low, 0x4140u), a[1] = levels<kBits>(high, 0x4140u);
            a[2] = levels<kBits>(low, 0x4342u), a[3] = levels<kBits>(high, 0x4342u);
        } else {  // transposed, a register is {row g, row g + 8} of channel 2 c, then of 2 c + 1
            const uint32_t first = transpose_8x8(elements[2 * block]), second = transpose_8x8(elements[2 * block + 1]);
            a[0] = levels<kBits>(first, 0x4240u), a[1] = levels<kBits>(first, 0x4341u);
            a[2] = levels<kBits>(second, 0x4240u), a[3] = levels<kBits>(second, 0x4341u);
        }
    }
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<Element, __half>) {
        const __half2 pair = __floats2half2_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&pair);
    } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&pair);
    }
}

__device__ __forceinline__ float2 unpack(uint32_t pair) {
    if constexpr (std::is_same_v<Element, __half>)
        return __half22float2(*reinterpret_cast<const __half2*>(&pair));
    else
        return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}

// What a class's scale is to be multiplied by: levels are in units of the codebook, e4m4 scales of 2^kE4m4Exponent.
template <class Side>
__device__ constexpr float scale_unit(int cls) {
    const float book = Side::bits(cls) == 4   ? Codebook<4>::unit
                       : Side::bits(cls) == 3 ? Codebook<3>::unit
                                              : Codebook<2>::unit;
    return (Side::classes == 2 ? 1 << kE4m4Exponent : 1) / book;
}

enum class Source { kNone, kCodes, kExact, kChunk };

// What a warp does with a tile: rows [begin, end) of 16 go to `out`, which is where row 0 would.
struct Tile {
    Source source;
    int begin, end;
    Element* out;
    const void* from;  // a unit of codes or of exact rows, or the first row of the chunk
};

// A tile, and a lane's share of its codes.
template <class Side>
struct Fetched {
    Tile tile;
    uint32_t words[Side::words];
    uint32_t scales;  // of rows g and g + 8
};

__device__ __forceinline__ PrefixPiece piece_of(const PrefixParams& p, int tile) {
    int first = 0, last = p.piece_count - 1;
    while (first < last) {
        const int middle = (first + last + 1) / 2;
        if (__ldg(&p.pieces[middle].first_tile) <= tile)
            first = middle;
        else
            last = middle - 1;
    }
    return p.pieces[first];
}

__device__ __forceinline__ Tile locate(const PrefixParams& p, const PrefixSide& side, int index, int head) {
    if (index >= p.tiles) return {Source::kNone, 0, 0, nullptr, nullptr};
    const PrefixPiece piece = piece_of(p, index);
    Element* const out = static_cast<Element*>(side.out) + head * p.out_head_stride;
    const int first_unit = piece.first / kUnitTokens;
    const int units = piece.last > piece.first ? (piece.last - 1) / kUnitTokens + 1 - first_unit : 0;
    const int place = index - piece.first_tile;
    if (place >= units) {
        const int start = (place - units) * kUnitTokens;
        const int64_t row = piece.row + piece.last - piece.first + start;
        return {Source::kChunk, 0, min(kUnitTokens, piece.chunk_tokens - start), out + row * p.out_token_stride,
                static_cast<const Element*>(side.chunk) + head * side.chunk_head_stride +
                    static_cast<int64_t>(piece.chunk_first + start) * side.chunk_token_stride};
    }
    const int unit = first_unit + place, start = unit * kUnitTokens;
    const int64_t row = piece.row + start - piece.first;
    Tile tile{Source::kCodes, max(0, piece.first - start), min(kUnitTokens, piece.last - start),
              out + row * p.out_token_stride, nullptr};
    const int64_t page = __ldg(p.block_table + piece.request * p.table_stride + unit / p.page_units);
    const int in_page = unit % p.page_units;
    if (p.hot_slot != nullptr) {
        const bool recent = p.recent_tokens > 0 && unit >= max(0, piece.length - p.recent_tokens) / kUnitTokens;
        const int slot = recent || unit < p.sink_units ? __ldg(p.hot_slot + page * p.page_units + in_page) : -1;
        if (slot >= 0) {
            tile.source = Source::kExact;
            tile.from = static_cast<const __nv_bfloat16*>(side.hot_pool) +
                        (static_cast<int64_t>(slot) * p.kv_heads + head) * kUnitTokens * kHeadSize;
            return tile;
        }
    }
    tile.from =
        p.cache + page * p.page_stride + head * p.head_stride + static_cast<int64_t>(in_page) * CacheUnit::bytes;
    return tile;
}

template <class Side, bool kIsKey>
__device__ __forceinline__ Fetched<Side> fetch(const PrefixParams& p, const PrefixSide& side, int index, int head,
                                               int lane) {
    Fetched<Side> fetched;
    fetched.tile = locate(p, side, index, head);
    if (fetched.tile.source == Source::kCodes) {
        const auto* const unit = static_cast<const uint8_t*>(fetched.tile.from);
        load_words(fetched.words, unit + (kIsKey ? 0 : CacheUnit::value_offset), lane);
        fetched.scales = *reinterpret_cast<const uint32_t*>(unit + CacheUnit::scale_offset +
                                                            scale_place(kIsKey ? 0 : 1, lane / 4));
    }
    return fetched;
}

// Exact rows, as they are.
template <class From>
__device__ __forceinline__ void copy_rows(const PrefixParams& p, const Tile& tile, const From* rows,
                                          int64_t row_stride, int lane) {
#pragma unroll
    for (int i = 0; i < kUnitTokens * kVectors / kLanes; ++i) {
        const int row = (i * kLanes + lane) / kVectors, column = (i * kLanes + lane) % kVectors * 8;
        if (row < tile.begin || row >= tile.end) continue;
        uint4 eight = *reinterpret_cast<const uint4*>(rows + row * row_stride + column);
        if constexpr (!std::is_same_v<From, Element>) {
            uint32_t* const pairs = reinterpret_cast<uint32_t*>(&eight);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float2 wide = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(pairs + j));
                pairs[j] = pack(wide.x, wide.y);
            }
        }
        *reinterpret_cast<uint4*>(tile.out + row * p.out_token_stride + column) = eight;
    }
}

// Where rows wait that are written in another order of channels: [warp][16][kStageRow] elements. The pitch of a row
// puts eight rows' elements of one channel into different banks.
constexpr int kStageRow = kHeadSize + 8;
constexpr int kStageBytes = kUnitTokens * kStageRow * 2;

// Codes of a unit to rows. `stage`: of this warp; null where channels are in order.
template <class Side, bool kIsKey, class Operand>
__device__ __forceinline__ void dequantise(const PrefixParams& p, const PrefixSide& side, const Operand& operand,
                                           const Decoder& decoder, const Fetched<Side>& unit, Element* stage, int head,
                                           int lane) {
    const int g = lane / 4, c = lane % 4;
    const Tile& tile = unit.tile;
    uint32_t y[kBlocks][4];
    decode_class<Side, kIsKey, 0>(y, unit.words, decoder);
    if constexpr (Side::classes == 2) decode_class<Side, kIsKey, 1>(y, unit.words, decoder);
    operand.prepare(y);
    float scale[Side::classes][2];  // of rows g and g + 8
#pragma unroll
    for (int cls = 0; cls < Side::classes; ++cls) {
        const float2 both = __half22float2(class_scales<Side>(unit.scales, cls));
        scale[cls][0] = both.x * scale_unit<Side>(cls), scale[cls][1] = both.y * scale_unit<Side>(cls);
    }
    const auto* const factor = reinterpret_cast<const float4*>(side.factor + head * side.factor_head_stride) + c;
    const auto* const mean = reinterpret_cast<const float4*>(side.mean + head * kHeadSize) + c;
    const auto* const order = reinterpret_cast<const int4*>(side.order + head * kHeadSize) + c;
    Element* const lines[2] = {tile.out + g * p.out_token_stride + 4 * c,
                               tile.out + (g + 8) * p.out_token_stride + 4 * c};
    const bool writes[2] = {g >= tile.begin && g < tile.end, g + 8 >= tile.begin && g + 8 < tile.end};
#pragma unroll Operand::unroll
    for (int out = 0; out < kBlocks; ++out) {
        Sums<Operand::classes> sums = {};
        operand.multiply(sums, y, out);
        const float4 f = __ldg(factor + 4 * out);
        const float4 m = side.mean != nullptr ? __ldg(mean + 4 * out) : make_float4(0.f, 0.f, 0.f, 0.f);
        const int cls = Operand::classes == Side::classes ? 0 : Rotation<Side>::class_of(out);  // of sums[0]
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float x[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int n_tile = i / 2, e = 2 * row + i % 2;
                x[i] = sums[0][n_tile][e] * scale[cls][row];
                if constexpr (Operand::classes == 2) x[i] = fmaf(sums[1][n_tile][e], scale[1][row], x[i]);
            }
            const uint2 four = make_uint2(pack(fmaf(x[0], f.x, m.x), fmaf(x[1], f.y, m.y)),
                                          pack(fmaf(x[2], f.z, m.z), fmaf(x[3], f.w, m.w)));
            if (stage == nullptr) {
                if (writes[row]) *reinterpret_cast<uint2*>(lines[row] + 16 * out) = four;
            } else {
                const int4 channel = __ldg(order + 4 * out);
                auto* const line = reinterpret_cast<uint16_t*>(stage) + (g + 8 * row) * kStageRow;
                line[channel.x] = static_cast<uint16_t>(four.x), line[channel.y] = static_cast<uint16_t>(four.x >> 16);
                line[channel.z] = static_cast<uint16_t>(four.y), line[channel.w] = static_cast<uint16_t>(four.y >> 16);
            }
        }
    }
    if (stage != nullptr) {
        __syncwarp();
        copy_rows(p, tile, stage, kStageRow, lane);
        __syncwarp();
    }
}

template <class Side, bool kIsKey, class Operand>
__device__ __forceinline__ void read_side(const PrefixParams& p) {
    const PrefixSide& side = p.sides[kIsKey ? 0 : 1];
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, head = blockIdx.y;
    const int step = gridDim.x * (blockDim.x / kLanes);
    int index = blockIdx.x * (blockDim.x / kLanes) + warp;
    extern __shared__ uint4 shared[];
    Element* const stage =
        side.order != nullptr ? reinterpret_cast<Element*>(shared) + warp * kUnitTokens * kStageRow : nullptr;
    Fetched<Side> next = fetch<Side, kIsKey>(p, side, index, head, lane);
    const Decoder decoder(p.negative_zero);
    const Operand operand(side, head, lane);
    for (; index < p.tiles; index += step) {
        const Fetched<Side> now = next;
        next = fetch<Side, kIsKey>(p, side, index + step, head, lane);  // on its way meanwhile
        const Tile& tile = now.tile;
        if (tile.source == Source::kCodes)
            dequantise<Side, kIsKey>(p, side, operand, decoder, now, stage, head, lane);
        else if (tile.source == Source::kExact)
            copy_rows(p, tile, static_cast<const __nv_bfloat16*>(tile.from), kHeadSize, lane);
        else
            copy_rows(p, tile, static_cast<const Element*>(tile.from), side.chunk_token_stride, lane);
    }
}

// Grid: x shares out tiles, y is the KV head, z the side.
template <int kMostWarps, bool kMayBeMatrix>
__global__ void __launch_bounds__(kMostWarps* kLanes, warps_per_processor(kMayBeMatrix) / kMostWarps)
    prefix_kernel(const __grid_constant__ PrefixParams p) {
    using Key = CacheUnit::Key;
    using Value = CacheUnit::Value;
    if (blockIdx.z == 0) {
        if (kMayBeMatrix && p.sides[0].matrix != nullptr)
            read_side<Key, true, MatrixOperand<Key>>(p);
        else
            read_side<Key, true, RotationOperand<Key, true>>(p);
    } else {
        if (kMayBeMatrix && p.sides[1].matrix != nullptr)
            read_side<Value, false, MatrixOperand<Value>>(p);
        else
            read_side<Value, false, RotationOperand<Value, false>>(p);
    }
}

// out += w (partial - out), with w the partial's share of the whole sum of exponentials.
__global__ void merge_kernel(const __grid_constant__ MergeParams p) {
    // A row's lanes share a warp: its sum is read before it is replaced.
    constexpr int kRowsOfWarp = kLanes / kVectors;
    const int lane = threadIdx.x % kLanes, warps = blockDim.x / kLanes;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / kLanes;
    const int64_t row = warp * kRowsOfWarp + lane / kVectors;  // token * heads + head
    const bool active = lane < kRowsOfWarp * kVectors && row < static_cast<int64_t>(p.tokens) * p.heads;
    const int token = active ? static_cast<int>(row / p.heads) : 0, head = active ? static_cast<int>(row % p.heads) : 0;
    float* const lse = p.lse + head * p.lse_head_stride + token;
    const float mine = active ? *lse : 0.f;
    const float theirs = active ? __ldg(p.partial_lse + static_cast<int64_t>(head) * p.tokens + token) : 0.f;
    __syncwarp();
    if (!active || isinf(theirs)) return;
    const float greater = fmaxf(mine, theirs), sum = expf(mine - greater) + expf(theirs - greater);
    const float weight = expf(theirs - greater) / sum;
    const int column = lane % kVectors * 8;
    if (column == 0) *lse = greater + logf(sum);
    const auto* const line = static_cast<const Element*>(p.partial) + row * kHeadSize + column;
    const uint4 other = __ldg(reinterpret_cast<const uint4*>(line));
    uint4* const place = reinterpret_cast<uint4*>(static_cast<Element*>(p.out) + token * p.out_token_stride +
                                                  head * p.out_head_stride + column);
    uint4 eight = *place;
    auto* const pairs = reinterpret_cast<uint32_t*>(&eight);
    const auto* const others = reinterpret_cast<const uint32_t*>(&other);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 a = unpack(pairs[i]), b = unpack(others[i]);
        pairs[i] = pack(fmaf(weight, b.x - a.x, a.x), fmaf(weight, b.y - a.y, a.y));
    }
    *place = eight;
}

// As many CTAs as run at once: a warp has several tiles, and a CTA that holds a matrix keeps it for them.
template <int kMostWarps, bool kMayBeMatrix>
cudaError_t launch(const PrefixParams& p, cudaStream_t stream) {
    const auto kernel = prefix_kernel<kMostWarps, kMayBeMatrix>;
    const bool any_order = p.sides[0].order != nullptr || p.sides[1].order != nullptr;
    const int bytes = std::max(kMayBeMatrix ? kMatrixBytes : 0, any_order ? kMostWarps * kStageBytes : 0);
    int device = 0, processors = 0, resident = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (status == cudaSuccess)
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status == cudaSuccess)
        status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kMostWarps * kLanes, bytes);
    if (status != cudaSuccess) return status;
    const int most = std::max(processors * resident / (2 * p.kv_heads), 1);
    const dim3 grid(std::min((p.tiles + kMostWarps - 1) / kMostWarps, most), p.kv_heads, 2);
    kernel<<<grid, kMostWarps * kLanes, bytes, stream>>>(p);
    return cudaGetLastError();
}

}  // namespace

cudaError_t launch_read_prefix(const PrefixParams& p, cudaStream_t stream) {
    if (p.tiles == 0) return cudaSuccess;
    const bool any_matrix = p.sides[0].matrix != nullptr || p.sides[1].matrix != nullptr;
    return any_matrix ? launch<kMatrixWarps, true>(p, stream) : launch<kWarps, false>(p, stream);
}

cudaError_t launch_merge(const MergeParams& p, cudaStream_t stream) {
    constexpr int kThreads = 256, kRowsOfBlock = kThreads / kLanes * (kLanes / kVectors);
    const int64_t rows = static_cast<int64_t>(p.tokens) * p.heads;
    if (rows == 0) return cudaSuccess;
    merge_kernel<<<static_cast<unsigned>((rows + kRowsOfBlock - 1) / kRowsOfBlock), kThreads, 0, stream>>>(p);
    return cudaGetLastError();
}

}  // namespace mq
