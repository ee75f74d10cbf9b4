// Python's view of the vector kernels; manthanquant/cuda/vectors.py checks the arguments.
#include "bindings.h"
#include "vectors.h"

PYBIND11_MODULE(MQ_MODULE, m) {
    pybind11::enum_<mq::VectorType>(m, "VectorType")
        .value("bfloat16", mq::VectorType::bfloat16)
        .value("float16", mq::VectorType::float16)
        .value("float32", mq::VectorType::float32);
    pybind11::class_<mq::VectorParams>(m, "VectorParams")
        .def(pybind11::init([](mq::VectorType type, int64_t count, int size, int64_t row_stride, int64_t code_words,
                               float root, float inverse_root) {
            return mq::VectorParams{type, count, size, row_stride, code_words, root, inverse_root};
        }));
    m.def("encode", [](uintptr_t stream, const mq::VectorParams& params, uintptr_t vectors, uintptr_t codes,
                       uintptr_t radius) {
        mq::check(mq::launch_encode(params, mq::pointer<const void>(vectors), mq::pointer<uint32_t>(codes),
                                    mq::pointer<float>(radius), mq::stream(stream)),
                  "encode");
    });
    m.def("decode", [](uintptr_t stream, const mq::VectorParams& params, uintptr_t codes, uintptr_t radius,
                       uintptr_t vectors) {
        mq::check(mq::launch_decode(params, mq::pointer<const uint32_t>(codes), mq::pointer<const float>(radius),
                                    mq::pointer<void>(vectors), mq::stream(stream)),
                  "decode");
    });
}
