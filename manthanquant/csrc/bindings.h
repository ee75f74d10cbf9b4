// What every CUDA binding needs: pointers and streams come from Python as integers (no PyTorch headers: a build takes
// seconds and serves every PyTorch), and a CUDA error becomes an exception.
#pragma once

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

namespace mq {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

inline cudaStream_t stream(uintptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

}  // namespace mq
