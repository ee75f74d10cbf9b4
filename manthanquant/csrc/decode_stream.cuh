// A warp's stream of items from memory into its own ring in shared memory.
//
// Each warp is its own producer and consumer, so no CTA barrier stands in the loop. On sm_90 and later one lane asks
// the copy engine for a whole item and an mbarrier counts its bytes; before that all lanes copy with cp.async. The
// stream runs on across the segments of the team's stretch, so the next pair's first block is already on its way while
// the last one is merged. Page ids and slots are read one item ahead.
#pragma once

#include "decode_plan.cuh"

namespace mq {

// Bytes of bf16 keys, or values, of an exact unit.
template <class Unit>
constexpr int exact_side_bytes() {
    return kUnitTokens * Unit::head_size * 2;
}

// A place of the ring: for a block of codes, and for keys and values of an exact unit.
template <class Unit, bool kHasExact>
constexpr int slot_bytes() {
    constexpr int kBlock = kBlockUnits * Unit::bytes, kExact = 2 * exact_side_bytes<Unit>();
    return kHasExact && kExact > kBlock ? kExact : kBlock;
}

template <class Unit, int kStages, int kTeamWarps, bool kBulkCopy, bool kHasExact>
class ItemStream {
  public:
    static constexpr int kExactSideBytes = exact_side_bytes<Unit>();
    static constexpr int kSlotBytes = slot_bytes<Unit, kHasExact>();
    static constexpr int kRingBytes = kStages * kSlotBytes;

    // What the warp keeps in shared memory: barriers, and its place in the team's stretch, which is looked at once a
    // segment and would waste registers.
    struct Shared {
        uint64_t barriers[kStages];
        Work<kHasExact> work;
    };

    // Collective over a warp. `ring` and `shared` are the warp's own.
    __device__ __forceinline__ ItemStream(const DecodeParams& params, const Work<kHasExact>& work, int warp_in_team,
                                          uint8_t* ring, Shared& shared)
        : params_(params), shared_(shared), lane_(threadIdx.x % 32), warp_in_team_(warp_in_team), ring_(ring),
          ring_address_(shared_address(ring)), barrier_(shared_address(shared.barriers)) {
        if constexpr (kBulkCopy) {
            if (lane_ == 0) {
                for (int stage = 0; stage < kStages; ++stage) mbarrier_init(barrier_ + 8 * stage, 1);
                mbarrier_init_fence();
            }
            policy_ = evict_first_policy();
        }
        if (lane_ == 0) shared_.work = work;
        __syncwarp();
        if (work.done()) {
            open_ = false;
        } else {
            enter_segment(work.segment);
            seek();
        }
    }

    __device__ __forceinline__ void fill() {
#pragma unroll
        for (int stage = 0; stage < kStages; ++stage) issue(stage);
    }

    // Brings the block after those of `fill` into L2: for when it will be a while until the first one is read.
    __device__ __forceinline__ void prefetch() {
        if constexpr (kBulkCopy) {
            if (!open_ || is_exact()) return;
            const int count = block_units();
            if (lane_ < block_runs(count))
                bulk_prefetch_l2(unit_source(block_ * kBlockUnits + lane_, page_), run_bytes(count));
        }
    }

    // The warp's next item, once it has landed: a block of codes, or keys and values of an exact unit.
    __device__ __forceinline__ const uint8_t* wait() {
        if constexpr (kBulkCopy) {
            mbarrier_wait(barrier_ + 8 * stage_, parity_);
        } else {
            cp_async_wait<kStages - 1>();
            __syncwarp();
        }
        return ring_ + stage_ * kSlotBytes;
    }

    // The whole warp has read that item: its place takes the item that comes kStages later.
    __device__ __forceinline__ void release() {
        __syncwarp();
        issue(stage_);
        if (++stage_ == kStages) stage_ = 0, parity_ ^= 1;
    }

  private:
    __device__ __forceinline__ void enter_segment(const Segment& segment) {
        const Span span = request_span<kHasExact>(params_, segment.request);
        units_ = span.units;
        block_ = span.first_block + segment.begin + warp_in_team_;
        coded_end_ = span.first_block + span.coded_blocks;
        end_ = span.first_block + segment.end;
        table_ = params_.block_table + segment.request * params_.table_stride;
        head_ = params_.cache + segment.head * params_.head_stride;
        if constexpr (kHasExact) {
            exact_items_ = 0;
            const int item = first_exact_item<kTeamWarps>(span, segment, warp_in_team_) + lane_ * kTeamWarps;
            exact_slots_ = item < segment.end
                               ? exact_slot(params_, segment.request, span.exact_unit(item - span.coded_blocks))
                               : -1;
        }
    }

    // Moves on to the segment that holds this warp's next item, and reads where that lies.
    __device__ __forceinline__ void seek() {
        while (block_ >= end_) {
            Work<kHasExact> work = shared_.work;
            work.next(params_);
            if (work.done()) {
                open_ = false;
                return;
            }
            __syncwarp();
            if (lane_ == 0) shared_.work = work;
            __syncwarp();
            enter_segment(work.segment);
        }
        if (is_exact()) {
            page_ = __shfl_sync(kFullWarp, exact_slots_, exact_items_++);
            return;
        }
        const int unit = block_ * kBlockUnits + lane_;
        page_ = lane_ < kBlockUnits && unit < units_ ? __ldg(table_ + page_of_unit(params_, unit)) : 0;
    }

    __device__ bool is_exact() const { return kHasExact && block_ >= coded_end_; }

    __device__ __forceinline__ const uint8_t* unit_source(int unit, int page) const {
        const int in_page = unit - page_of_unit(params_, unit) * params_.page_units;
        return head_ + page * params_.page_stride + in_page * Unit::bytes;
    }

    __device__ __forceinline__ void issue(int stage) {
        if (open_) {
            const uint32_t target = ring_address_ + stage * kSlotBytes, barrier = barrier_ + 8 * stage;
            if (is_exact()) {
                copy_exact(target, barrier);
            } else if constexpr (kBulkCopy) {
                copy_block_bulk(target, barrier);
            } else {
                copy_block_by_lanes(target);
            }
            block_ += kTeamWarps;
            seek();
        }
        if constexpr (!kBulkCopy) cp_async_commit();  // an empty group keeps the count of groups in flight
    }

    // How many of the next block's units hold tokens.
    __device__ int block_units() const { return max(0, min(kBlockUnits, units_ - block_ * kBlockUnits)); }

    // A block of `count` units as runs of contiguous bytes: one if it lies in one page.
    __device__ bool in_one_page() const { return params_.page_units % kBlockUnits == 0; }
    __device__ int block_runs(int count) const { return in_one_page() ? min(count, 1) : count; }
    __device__ int run_bytes(int count) const { return in_one_page() ? count * Unit::bytes : Unit::bytes; }

    __device__ __forceinline__ void copy_block_bulk(uint32_t target, uint32_t barrier) {
        const int count = block_units();
        if (lane_ == 0) mbarrier_expect(barrier, count * Unit::bytes);
        __syncwarp();
        if (lane_ < block_runs(count))
            bulk_copy(target + lane_ * Unit::bytes, unit_source(block_ * kBlockUnits + lane_, page_), run_bytes(count),
                      barrier, policy_);
        __syncwarp();
    }

    __device__ __forceinline__ void copy_block_by_lanes(uint32_t target) {
        for (int unit = 0; unit < block_units(); ++unit)
            copy_run(target + unit * Unit::bytes,
                     unit_source(block_ * kBlockUnits + unit, __shfl_sync(kFullWarp, page_, unit)), Unit::bytes);
    }

    // Keys, then values. A unit without a slot is an item without bytes.
    __device__ __forceinline__ void copy_exact(uint32_t target, uint32_t barrier) {
        const int64_t first = page_ * params_.hot_slot_stride + shared_.work.segment.head * params_.hot_head_stride;
        const uint16_t *keys = params_.hot_key + first, *values = params_.hot_value + first;
        if constexpr (kBulkCopy) {
            if (lane_ == 0) {
                mbarrier_expect(barrier, page_ >= 0 ? 2 * kExactSideBytes : 0);
                if (page_ >= 0) {
                    bulk_copy(target, keys, kExactSideBytes, barrier, policy_);
                    bulk_copy(target + kExactSideBytes, values, kExactSideBytes, barrier, policy_);
                }
            }
            __syncwarp();
        } else if (page_ >= 0) {
            copy_run(target, keys, kExactSideBytes);
            copy_run(target + kExactSideBytes, values, kExactSideBytes);
        }
    }

    __device__ __forceinline__ void copy_run(uint32_t target, const void* source, int bytes) {
        for (int byte = lane_ * 16; byte < bytes; byte += kLanes * 16)
            cp_async_16(target + byte, static_cast<const uint8_t*>(source) + byte);
    }

    const DecodeParams& params_;
    Shared& shared_;
    int lane_;
    int warp_in_team_;
    uint8_t* ring_;
    uint32_t ring_address_;
    uint32_t barrier_;
    uint64_t policy_ = 0;

    bool open_ = true;  // there is an item to copy
    int block_;         // the next item, counted as a block of the sequence
    int coded_end_;     // from here on items are exact units
    int end_;
    int units_;
    int page_;  // lanes 0 to 3: the pages of its units. An exact unit: its slot
    int exact_slots_;  // lane i: the slot of the warp's i-th exact item of the segment, all looked up at once
    int exact_items_;  // exact items of the segment that are behind
    const int32_t* table_;
    const uint8_t* head_;

    int stage_ = 0;
    uint32_t parity_ = 0;
};

}  // namespace mq
