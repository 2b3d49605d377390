// How does a function that Python calls by ctypes (kernels/cuda_library.py) launch a kernel?
#pragma once

#include "tensor_lists.cuh"

namespace fuseer {
namespace {

// `kernel` over `blocks` blocks of `threads`; a cudaError_t, 0 where the launch was accepted.
template <typename... Expected, typename... Given>
int launch(void (*kernel)(Expected...), int64_t blocks, void* stream, Given&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, static_cast<Given&&>(arguments)...));
}

}  // namespace
}  // namespace fuseer
