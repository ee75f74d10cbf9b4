// Prefix: cached tokens back to the keys and values that the model made, for dense attention to read.
//
// The store's mirror image. A warp takes a unit (16 tokens of one KV head) and one side through all of it, in
// registers:
//
//   1. Load the lane's words and permute bytes to levels, as decode attention does (decode_codes.cuh).
//   2. Levels to the A fragments of a matrix instruction: small integers or halves, exact in fp16. Key registers are
//      rows of tokens already; value registers are rows of channels, and one 8 x 8 transposition turns them.
//   3. X = Y T^-T on the tensor cores, 16 or 32 channels of X at a time. T^-1 is a matrix in fp16 and a factor; of a
//      Hadamard rotation it is exact, and so is every sum. On sm_90 the four warps of a warpgroup multiply their units
//      together, and the tensor cores read the matrix from shared memory; elsewhere a warp does so alone, with the
//      matrix from L1.
//   4. Scales, which belong to rows, and the key mean in fp32; then round once and write. The matrix's rows are dealt
//      so that a lane ends up with 4 or 8 consecutive channels.
//
// Units that the exact tier holds are copied from it, and so are the chunk's own tokens behind the prefix, so that one
// dense call sees both. Per token and head 100 bytes are read and 512 written (k3v3, D = 128).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <climits>
#include <type_traits>

#include "codebook.h"
#include "decode_codes.cuh"
#include "layout.h"
#include "prefix.h"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace mq {
namespace {

using Element = MQ_PREFIX_ELEMENT;  // __nv_bfloat16 or __half
using CacheUnit = Unit<MQ_FORMAT, MQ_HEAD_SIZE>;

constexpr int kHeadSize = MQ_HEAD_SIZE;
constexpr int kBlocks = kHeadSize / 16;  // k tiles of Y
constexpr int kWarps = 8;                // of a CTA: two warpgroups, which share a matrix
constexpr int kWarpsPerProcessor = kHeadSize > 128 ? 8 : 16;  // what registers allow
constexpr int kVectors = kHeadSize / 8;  // 16-byte vectors of a row
constexpr int kGroupTiles = kHeadSize % 32 == 0 ? 4 : 2;  // n tiles, of 8 channels, that are worked on at a time
constexpr int kGroupChannels = 8 * kGroupTiles;
constexpr int kRun = 2 * kGroupTiles;  // consecutive channels of a group that a lane has of a row

// T^-1 as B: 8 x 8 core matrices, [n tile][k half tile][row: channel of X][channel of Y]. manthanquant/cuda/prefill.py
// deals the channels. Keys' k: as the page deals them, lane c's four bytes; values' as they come.
constexpr int kCoreBytes = 8 * 8 * 2;
constexpr int kTileBytes = kHeadSize / 8 * kCoreBytes;  // of an n tile

// What belongs to a CTA's head and side.
struct Shared {
#if MQ_WGMMA
    alignas(128) uint8_t matrix[kHeadSize / 8 * kTileBytes];
#endif
    alignas(16) float key_mean[kHeadSize];
};

// All threads of the CTA.
__device__ __forceinline__ void load_operands(Shared& shared, const uint8_t* matrix, const float* key_mean) {
    for (int i = threadIdx.x; i < kHeadSize; i += blockDim.x)
        shared.key_mean[i] = key_mean != nullptr ? __ldg(key_mean + i) : 0.f;
#if MQ_WGMMA
    for (int i = threadIdx.x * 16; i < static_cast<int>(sizeof(shared.matrix)); i += blockDim.x * 16)
        cp_async_16(shared_address(shared.matrix + i), matrix + i);
    cp_async_commit();
    cp_async_wait<0>();
    wgmma_publish();
#endif
    __syncthreads();
}

// Sums over one group of output channels: [n tile][C register]. The matrix mixes the classes of channels, whose scales
// differ, so there are sums for each.
template <int kClasses>
using Sums = float[kClasses][kGroupTiles][4];

// Y times the matrix's columns of one group; all warps of the CTA. `matrix`: where it lies in global memory.
template <class Side>
__device__ __forceinline__ void multiply(Sums<Side::classes>& sums, const uint32_t (&y)[kBlocks][4],
                                         const Shared& shared, const uint8_t* matrix, int group, int lane) {
    constexpr int kClassBlocks = Side::channels(0) / 16;
#if MQ_WGMMA
    const WgmmaOperand tiles =
        WgmmaOperand(shared_address(shared.matrix), kCoreBytes, kTileBytes).at(group * kGroupTiles * kTileBytes);
    wgmma_begin(sums);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
        const int cls = block < kClassBlocks ? 0 : 1;
        const bool first = block == 0 || block == kClassBlocks;
        wgmma<__half>(sums[cls], !first, y[block], tiles.at(2 * block * kCoreBytes));
    }
    wgmma_end(sums);
#else
    // A lane has row lane / 4 of each core matrix, and a pair of its columns.
    const uint8_t* const core = matrix + group * kGroupTiles * kTileBytes + 4 * lane;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
        const int cls = block < kClassBlocks ? 0 : 1;
#pragma unroll
        for (int tile = 0; tile < kGroupTiles; ++tile) {
            const auto* const pair =
                reinterpret_cast<const uint32_t*>(core + tile * kTileBytes + 2 * block * kCoreBytes);
            mma_16bit<__half>(sums[cls][tile], y[block], pair[0], pair[kCoreBytes / 4]);
        }
        asm volatile("" ::: "memory");  // or the compiler loads the whole matrix first, and spills
    }
#endif
}

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
    int more = 0;      // units that follow in the page, all of them codes whose 16 rows are wanted
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

// Tile `index` of those before `end`.
__device__ __forceinline__ Tile locate(const PrefixParams& p, const PrefixSide& side, int index, int end, int head) {
    if (index >= end) return {Source::kNone, 0, 0, nullptr, nullptr};
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
    int more = min(piece.last / kUnitTokens - unit, p.page_units - in_page) - 1;
    if (p.hot_slot != nullptr) {
        const int recent = p.recent_tokens > 0 ? max(0, piece.length - p.recent_tokens) / kUnitTokens : INT_MAX;
        const bool may_be_exact = unit < p.sink_units || unit >= recent;
        more = may_be_exact ? 0 : min(more, recent - unit - 1);
        const int slot = may_be_exact ? __ldg(p.hot_slot + page * p.page_units + in_page) : -1;
        if (slot >= 0) {
            tile.source = Source::kExact;
            tile.from = static_cast<const __nv_bfloat16*>(side.hot_pool) +
                        (static_cast<int64_t>(slot) * p.kv_heads + head) * kUnitTokens * kHeadSize;
            return tile;
        }
    }
    tile.more = more;
    tile.from =
        p.cache + page * p.page_stride + head * p.head_stride + static_cast<int64_t>(in_page) * CacheUnit::bytes;
    return tile;
}

// Tile `index`, given the one before it.
__device__ __forceinline__ Tile following(const PrefixParams& p, const PrefixSide& side, const Tile& before, int index,
                                          int end, int head) {
    if (before.more <= 0 || index >= end) return locate(p, side, index, end, head);
    return {Source::kCodes, 0, kUnitTokens, before.out + kUnitTokens * p.out_token_stride,
            static_cast<const uint8_t*>(before.from) + CacheUnit::bytes, before.more - 1};
}

template <class Side, bool kIsKey>
__device__ __forceinline__ Fetched<Side> fetch(const Tile& tile, int lane) {
    Fetched<Side> fetched{tile};
    if (tile.source == Source::kCodes) {
        const auto* const unit = static_cast<const uint8_t*>(tile.from);
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

// Codes of a unit to rows.
template <class Side, bool kIsKey>
__device__ __forceinline__ void dequantise(const PrefixParams& p, const Shared& shared, const uint8_t* matrix,
                                           float factor, const Decoder& decoder, const Fetched<Side>& unit, int lane) {
    const int g = lane / 4, c = lane % 4;
    const Tile& tile = unit.tile;
    uint32_t y[kBlocks][4];
    decode_class<Side, kIsKey, 0>(y, unit.words, decoder);
    if constexpr (Side::classes == 2) decode_class<Side, kIsKey, 1>(y, unit.words, decoder);
    float scale[Side::classes][2];  // of rows g and g + 8
#pragma unroll
    for (int cls = 0; cls < Side::classes; ++cls) {
        const float2 both = __half22float2(class_scales<Side>(unit.scales, cls));
        const float common = factor * scale_unit<Side>(cls);
        scale[cls][0] = both.x * common, scale[cls][1] = both.y * common;
    }
    Element* const lines[2] = {tile.out + g * p.out_token_stride + kRun * c,
                               tile.out + (g + 8) * p.out_token_stride + kRun * c};
    const bool is_codes = tile.source == Source::kCodes;
    const bool writes[2] = {is_codes && g >= tile.begin && g < tile.end,
                            is_codes && g + 8 >= tile.begin && g + 8 < tile.end};
#pragma unroll 4
    for (int group = 0; group < kHeadSize / kGroupChannels; ++group) {
        Sums<Side::classes> sums = {};
        multiply<Side>(sums, y, shared, matrix, group, lane);
        float mean[kRun] = {};
#pragma unroll
        for (int i = 0; kIsKey && i < kRun; i += 4)
            *reinterpret_cast<float4*>(mean + i) =
                *reinterpret_cast<const float4*>(shared.key_mean + group * kGroupChannels + kRun * c + i);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t run[kGroupTiles];
#pragma unroll
            for (int n = 0; n < kGroupTiles; ++n) {
                float x[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    x[i] = mean[2 * n + i];
#pragma unroll
                    for (int cls = 0; cls < Side::classes; ++cls)
                        x[i] = fmaf(sums[cls][n][2 * half + i], scale[cls][half], x[i]);
                }
                run[n] = pack(x[0], x[1]);
            }
            using Run = std::conditional_t<kGroupTiles == 4, uint4, uint2>;
            if (writes[half])
                *reinterpret_cast<Run*>(lines[half] + group * kGroupChannels) = *reinterpret_cast<const Run*>(run);
        }
    }
}

template <class Side, bool kIsKey>
__device__ __forceinline__ void read_side(const PrefixParams& p, Shared& shared) {
    const PrefixSide& side = p.sides[kIsKey ? 0 : 1];
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, head = blockIdx.y;
    const uint8_t* const matrix = static_cast<const uint8_t*>(side.matrix) + head * side.matrix_head_stride;
    const float factor = __ldg(side.factor + head * side.factor_head_stride);
    // Neighbouring tiles go to one warp. All warps take as many, as they multiply together.
    const int warps = gridDim.x * kWarps, count = (p.tiles + warps - 1) / warps;
    int index = (blockIdx.x * kWarps + warp) * count;
    const int end = min(index + count, p.tiles);
    Fetched<Side> next = fetch<Side, kIsKey>(locate(p, side, index, end, head), lane);
    load_operands(shared, matrix, kIsKey && p.key_mean != nullptr ? p.key_mean + head * kHeadSize : nullptr);
    const Decoder decoder(p.negative_zero);
    for (int i = 0; i < count; ++i) {
        const Fetched<Side> now = next;
        ++index;
        next = fetch<Side, kIsKey>(following(p, side, now.tile, index, end, head), lane);  // on its way meanwhile
        dequantise<Side, kIsKey>(p, shared, matrix, factor, decoder, now, lane);
        const Tile& tile = now.tile;
        if (tile.source == Source::kExact)
            copy_rows(p, tile, static_cast<const __nv_bfloat16*>(tile.from), kHeadSize, lane);
        else if (tile.source == Source::kChunk)
            copy_rows(p, tile, static_cast<const Element*>(tile.from), side.chunk_token_stride, lane);
    }
}

// Grid: x shares out tiles, y is the KV head, z the side.
__global__ void __launch_bounds__(kWarps* kLanes, kWarpsPerProcessor / kWarps)
    prefix_kernel(const __grid_constant__ PrefixParams p) {
    extern __shared__ __align__(128) uint8_t bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(bytes);
    if (blockIdx.z == 0)
        read_side<CacheUnit::Key, true>(p, shared);
    else
        read_side<CacheUnit::Value, false>(p, shared);
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

}  // namespace

// As many CTAs as run at once: a warp has several tiles, and a CTA keeps its matrix for them.
cudaError_t launch_read_prefix(const PrefixParams& p, cudaStream_t stream) {
    if (p.tiles == 0) return cudaSuccess;
    constexpr int kThreads = kWarps * kLanes;
    int device = 0, processors = 0, resident = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (status == cudaSuccess)
        status = cudaFuncSetAttribute(prefix_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
    if (status == cudaSuccess)
        status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, prefix_kernel, kThreads, sizeof(Shared));
    if (status != cudaSuccess) return status;
    const int most = std::max(processors * resident / (2 * p.kv_heads), 1);
    const dim3 grid(std::min((p.tiles + kWarps - 1) / kWarps, most), p.kv_heads, 2);
    prefix_kernel<<<grid, kThreads, sizeof(Shared), stream>>>(p);
    return cudaGetLastError();
}

cudaError_t launch_merge(const MergeParams& p, cudaStream_t stream) {
    constexpr int kThreads = 256, kRowsOfBlock = kThreads / kLanes * (kLanes / kVectors);
    const int64_t rows = static_cast<int64_t>(p.tokens) * p.heads;
    if (rows == 0) return cudaSuccess;
    merge_kernel<<<static_cast<unsigned>((rows + kRowsOfBlock - 1) / kRowsOfBlock), kThreads, 0, stream>>>(p);
    return cudaGetLastError();
}

}  // namespace mq
