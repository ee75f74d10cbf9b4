// Python's view of the prefix kernels; manthanquant/cuda/prefill.py checks the arguments.
#include "bindings.h"
#include "prefix.h"

namespace {

// {out, matrix, matrix head stride, factor, factor head stride, chunk, chunk token stride, chunk head stride, hot pool}
using Side =
    std::tuple<uintptr_t, uintptr_t, int64_t, uintptr_t, int64_t, uintptr_t, int64_t, int64_t, uintptr_t>;

mq::PrefixSide prefix_side(const Side& side) {
    const auto [out, matrix, matrix_head_stride, factor, factor_head_stride, chunk, chunk_token_stride,
                chunk_head_stride, hot_pool] = side;
    return {mq::pointer<void>(out),
            mq::pointer<const void>(matrix),
            matrix_head_stride,
            mq::pointer<const float>(factor),
            factor_head_stride,
            mq::pointer<const void>(chunk),
            chunk_token_stride,
            chunk_head_stride,
            mq::pointer<const void>(hot_pool)};
}

}  // namespace

PYBIND11_MODULE(MQ_MODULE, m) {
    m.def("read_prefix", [](uintptr_t stream, const Side& key, const Side& value, uintptr_t key_mean,
                            int64_t out_token_stride, int64_t out_head_stride, uintptr_t pieces, int piece_count,
                            int tiles, uintptr_t block_table, int64_t table_stride, uintptr_t cache,
                            int64_t page_stride, int64_t head_stride, int page_units, int kv_heads, uintptr_t hot_slot,
                            int sink_units, int recent_tokens, uint32_t negative_zero) {
        const mq::PrefixParams params{{prefix_side(key), prefix_side(value)},
                                      mq::pointer<const float>(key_mean),
                                      out_token_stride,
                                      out_head_stride,
                                      mq::pointer<const mq::PrefixPiece>(pieces),
                                      piece_count,
                                      tiles,
                                      mq::pointer<const int>(block_table),
                                      table_stride,
                                      mq::pointer<const uint8_t>(cache),
                                      page_stride,
                                      head_stride,
                                      page_units,
                                      kv_heads,
                                      mq::pointer<const int>(hot_slot),
                                      sink_units,
                                      recent_tokens,
                                      negative_zero};
        mq::check(mq::launch_read_prefix(params, mq::stream(stream)), "read_prefix");
    });
    m.def("merge", [](uintptr_t stream, uintptr_t out, int64_t out_token_stride, int64_t out_head_stride, uintptr_t lse,
                      int64_t lse_head_stride, uintptr_t partial, uintptr_t partial_lse, int tokens, int heads) {
        const mq::MergeParams params{mq::pointer<void>(out),
                                     out_token_stride,
                                     out_head_stride,
                                     mq::pointer<float>(lse),
                                     lse_head_stride,
                                     mq::pointer<const void>(partial),
                                     mq::pointer<const float>(partial_lse),
                                     tokens,
                                     heads};
        mq::check(mq::launch_merge(params, mq::stream(stream)), "merge");
    });
}
