// Python's view of decode attention; manthanquant/cuda/decode.py fills the parameters and checks them.
#include "bindings.h"
#include "decode.h"

namespace py = pybind11;

namespace {

// A pointer member as an integer attribute.
template <class Params, class T>
void pointer_field(py::class_<Params>& cls, const char* name, T* Params::*member) {
    cls.def_property(
        name, [member](const Params& p) { return reinterpret_cast<uintptr_t>(p.*member); },
        [member](Params& p, uintptr_t address) { p.*member = mq::pointer<T>(address); });
}

template <class Params>
void dtype_field(py::class_<Params>& cls, const char* name, mq::Dtype Params::*member) {
    cls.def_property(
        name, [member](const Params& p) { return static_cast<int>(p.*member); },
        [member](Params& p, int dtype) { p.*member = static_cast<mq::Dtype>(dtype); });
}

// {factor, order, elements between KV heads}
using Transform = std::tuple<uintptr_t, uintptr_t, int64_t>;

void transform_field(py::class_<mq::DecodeParams>& cls, const char* name,
                     mq::StructuredTransform mq::DecodeParams::*member) {
    cls.def_property(name, nullptr, [member](mq::DecodeParams& p, const Transform& value) {
        const auto [factor, order, head_stride] = value;
        p.*member = {mq::pointer<const float>(factor), mq::pointer<const int32_t>(order), head_stride};
    });
}

// {fragments, elements between KV heads}
void dense_field(py::class_<mq::DecodeParams>& cls, const char* name, mq::DenseTransform mq::DecodeParams::*member) {
    cls.def_property(name, nullptr, [member](mq::DecodeParams& p, const std::tuple<uintptr_t, int64_t>& value) {
        p.*member = {mq::pointer<const uint16_t>(std::get<0>(value)), std::get<1>(value)};
    });
}

void bind_decode_params(py::module_& m) {
    using P = mq::DecodeParams;
    py::class_<P> cls(m, "DecodeParams", py::module_local());  // a process may load several builds
    cls.def(py::init([] { return P{}; }));
    pointer_field(cls, "cache", &P::cache);
    cls.def_readwrite("page_stride", &P::page_stride).def_readwrite("head_stride", &P::head_stride);
    cls.def_readwrite("page_units", &P::page_units).def_readwrite("page_magic", &P::page_magic);
    pointer_field(cls, "block_table", &P::block_table);
    cls.def_readwrite("table_stride", &P::table_stride);
    pointer_field(cls, "seq_lens", &P::seq_lens);
    pointer_field(cls, "query_start_loc", &P::query_start_loc);
    pointer_field(cls, "query", &P::query);
    dtype_field(cls, "query_dtype", &P::query_dtype);
    cls.def_readwrite("query_token_stride", &P::query_token_stride);
    cls.def_readwrite("query_head_stride", &P::query_head_stride);
    pointer_field(cls, "out", &P::out);
    dtype_field(cls, "out_dtype", &P::out_dtype);
    cls.def_readwrite("out_token_stride", &P::out_token_stride);
    cls.def_readwrite("out_head_stride", &P::out_head_stride);
    cls.def_readwrite("requests", &P::requests).def_readwrite("kv_heads", &P::kv_heads);
    cls.def_readwrite("group", &P::group).def_readwrite("query_tokens", &P::query_tokens);
    cls.def_readwrite("tile_rows", &P::tile_rows).def_readwrite("row_tiles", &P::row_tiles);
    cls.def_readwrite("scale_log2", &P::scale_log2).def_readwrite("soft_cap_log2", &P::soft_cap_log2);
    cls.def_readwrite("window", &P::window);
    pointer_field(cls, "sink_logits", &P::sink_logits);
    transform_field(cls, "key_inverse", &P::key_inverse);
    transform_field(cls, "value_inverse", &P::value_inverse);
    pointer_field(cls, "key_mean", &P::key_mean);
    dense_field(cls, "key_matrix", &P::key_matrix);
    dense_field(cls, "value_matrix", &P::value_matrix);
    pointer_field(cls, "hot_key", &P::hot_key);
    pointer_field(cls, "hot_value", &P::hot_value);
    cls.def_readwrite("hot_slot_stride", &P::hot_slot_stride).def_readwrite("hot_head_stride", &P::hot_head_stride);
    pointer_field(cls, "hot_slot", &P::hot_slot);
    cls.def_readwrite("sink_units", &P::sink_units).def_readwrite("recent_tokens", &P::recent_tokens);
    pointer_field(cls, "partial_tiles", &P::partial_tiles);
    pointer_field(cls, "partial_weights", &P::partial_weights);
    pointer_field(cls, "arrivals", &P::arrivals);
    cls.def_readwrite("negative_zero", &P::negative_zero);
}

}  // namespace

PYBIND11_MODULE(MQ_MODULE, m) {
    bind_decode_params(m);
    const mq::DecodeBuild build = mq::decode_build();
    m.attr("ROWS") = build.rows;
    m.attr("PARTIAL_FLOATS") = build.partial_floats;
    m.attr("MAX_EXACT_UNITS") = build.max_exact_units;
    m.attr("WARPS") = build.warps;
    m.attr("LARGE_TEAM") = build.large_team;
    m.attr("MEDIUM_TEAM") = build.medium_team;
    m.attr("SMALL_TEAM") = build.small_team;
    m.def("decode", [](const mq::DecodeParams& params, int ctas, int team_warps, uintptr_t stream) {
        mq::check(mq::launch_decode(params, ctas, team_warps, mq::stream(stream)), "decode attention");
    });
}
