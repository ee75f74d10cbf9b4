// The Python module: pointers and strides as integers, which the caller takes from tensors it has checked. No PyTorch
// header is needed, so one build serves any version of it.
#include <pybind11/pybind11.h>

#include "cpu_ops.h"

namespace py = pybind11;

namespace {

using namespace mq::cpu;

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// (address, dtype, token stride, head stride, channel stride)
Rows rows(const py::tuple& t) {
    return {pointer<char>(t[0].cast<uintptr_t>()), Dtype(t[1].cast<int>()), t[2].cast<int64_t>(), t[3].cast<int64_t>(),
            t[4].cast<int64_t>()};
}

// (address, pages, page stride, head stride, page tokens)
Cache cache(const py::tuple& t) {
    return {pointer<uint8_t>(t[0].cast<uintptr_t>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>(),
            t[4].cast<int>() / mq::kUnitTokens};
}

// (key address, value address, slots)
HotPool hot_pool(const py::tuple& t) {
    return {pointer<uint16_t>(t[0].cast<uintptr_t>()), pointer<uint16_t>(t[1].cast<uintptr_t>()), t[2].cast<int64_t>()};
}

// (address, head stride)
Matrices matrices(const py::tuple& t) { return {pointer<float>(t[0].cast<uintptr_t>()), t[1].cast<int64_t>()}; }

int64_t bind_store(const py::tuple& key, const py::tuple& value, const py::tuple& cache_tuple, const py::tuple& hot,
                   uintptr_t slots, uintptr_t hot_slots, int64_t tokens, int kv_heads, const py::tuple& key_forward,
                   const py::tuple& value_forward, uintptr_t key_mean) {
    const StoreArgs args{rows(key), rows(value), cache(cache_tuple), hot_pool(hot), pointer<int64_t>(slots),
                         pointer<int64_t>(hot_slots), tokens, kv_heads, matrices(key_forward), matrices(value_forward),
                         pointer<float>(key_mean)};
    py::gil_scoped_release release;
    return store(args);
}

void bind_attention(const py::tuple& query, const py::tuple& out, const py::tuple& chunk_key,
                    const py::tuple& chunk_value, const py::tuple& cache_tuple, const py::tuple& hot,
                    uintptr_t hot_slot, uintptr_t block_table, int64_t block_table_stride, int64_t block_table_pages,
                    uintptr_t seq_lens, uintptr_t query_start_loc, int requests, int heads, int kv_heads,
                    int64_t tokens, const py::tuple& key_inverse, const py::tuple& value_inverse, uintptr_t key_mean,
                    float scale, float soft_cap, int window, int sink_tokens, int recent_tokens) {
    const AttentionArgs args{rows(query), rows(out), rows(chunk_key), rows(chunk_value), cache(cache_tuple),
                             hot_pool(hot), pointer<int32_t>(hot_slot), pointer<int32_t>(block_table),
                             block_table_stride, block_table_pages, pointer<int32_t>(seq_lens),
                             pointer<int32_t>(query_start_loc), requests, heads, kv_heads, tokens,
                             matrices(key_inverse), matrices(value_inverse), pointer<float>(key_mean), scale, soft_cap,
                             window, sink_tokens, recent_tokens};
    py::gil_scoped_release release;
    attention(args);
}

}  // namespace

PYBIND11_MODULE(MQ_MODULE, m) {
    m.def("store", &bind_store);
    m.def("attention", &bind_attention);
}
