// Python's view of the store kernel; manthanquant/cuda/store.py checks the arguments.
#include "bindings.h"
#include "store.h"

namespace {

// {input, token stride, head stride, matrix, matrix head stride, is rotation, has mean, scale of class 0, of class 1,
// hot pool}
using Side = std::tuple<uintptr_t, int32_t, int32_t, uintptr_t, int64_t, bool, bool, float, float, uintptr_t>;

mq::StoreSide store_side(const Side& side) {
    const auto [input, token_stride, head_stride, matrix, matrix_head_stride, is_rotation, has_mean, scale0, scale1, hot] = side;
    return {mq::pointer<const void>(input),
            token_stride,
            head_stride,
            mq::pointer<const void>(matrix),
            matrix_head_stride,
            is_rotation,
            has_mean,
            {scale0, scale1},
            mq::pointer<void>(hot)};
}

}  // namespace

PYBIND11_MODULE(MQ_MODULE, m) {
    m.def("store", [](uintptr_t stream, const Side& key, const Side& value, uintptr_t slot_mapping, uintptr_t hot_slots,
                      uintptr_t cache, int64_t page_stride, int64_t head_stride, uintptr_t nonfinite, int tokens,
                      int kv_heads, int page_units, int page_shift) {
        const mq::StoreParams params{{store_side(key), store_side(value)},
                                     mq::pointer<const int64_t>(slot_mapping),
                                     mq::pointer<const int64_t>(hot_slots),
                                     mq::pointer<uint8_t>(cache),
                                     page_stride,
                                     head_stride,
                                     mq::pointer<unsigned long long>(nonfinite),
                                     tokens,
                                     kv_heads,
                                     page_units,
                                     page_shift};
        mq::check(mq::launch_store(params, mq::stream(stream)), "store");
    });
}
