// Encode and decode of plain vectors in the seed format. Shared by vectors.cu and its binding.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mq {

enum class VectorType { bfloat16, float16, float32 };

struct VectorParams {
    VectorType type;
    int64_t count;
    int size;            // elements of a vector
    int64_t row_stride;  // of the vectors, in elements; elements of a row are contiguous
    int64_t code_words;  // 32-bit words of a row of codes
    float root;          // sqrt(size)
    float inverse_root;  // 1 / sqrt(size)
};

// vectors -> codes [count, code_words], radius [count].
cudaError_t launch_encode(const VectorParams& params, const void* vectors, uint32_t* codes, float* radius,
                          cudaStream_t stream);
// codes, radius -> vectors.
cudaError_t launch_decode(const VectorParams& params, const uint32_t* codes, const float* radius, void* vectors,
                          cudaStream_t stream);

}  // namespace mq
