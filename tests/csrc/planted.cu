// Does cuda_on_cpu.h run what CUDA has, and does each planted mistake show?
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

// Softmax of a row by one block, in dynamic shared memory and by butterfly shuffles.
__global__ void softmax(const float* x, float* y, int n) {
  extern __shared__ float row[];
  __shared__ float of_warps[32];
  const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
  float top = -INFINITY, sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    row[i] = x[blockIdx.x * n + i];
    top = fmaxf(top, row[i]);
  }
  for (int bits = 16; bits > 0; bits /= 2) {
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, bits));
  }
  if (lane == 0) {
    of_warps[threadIdx.x / 32] = top;
  }
  __syncthreads();
  for (int w = 0; w < warps; ++w) {
    top = fmaxf(top, of_warps[w]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    row[i] = expf(row[i] - top);
    sum += row[i];
  }
  for (int bits = 16; bits > 0; bits /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, bits);
  }
  if (lane == 0) {
    of_warps[threadIdx.x / 32] = sum;
  }
  __syncthreads();
  sum = 0;
  for (int w = 0; w < warps; ++w) {
    sum += of_warps[w];
  }
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    y[blockIdx.x * n + i] = row[i] / sum;
  }
}

// Every thread of a grid in three dimensions writes its own number, after each kind of shuffle within eight lanes.
__global__ void indices(int32_t* out) {
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  int32_t* own = out + 5 * (block * blockDim.x * blockDim.y * blockDim.z + thread);
  own[0] = block * 1000 + thread;
  own[1] = __shfl_sync(0xffffffffu, thread, 3, 8);
  own[2] = __shfl_up_sync(0xffffffffu, thread, 2, 8);
  own[3] = __shfl_down_sync(0xffffffffu, thread, 2, 8);
  own[4] = __shfl_xor_sync(0xffffffffu, thread, 5, 8);
  __syncwarp();
}

struct alignas(16) Four {
  float of[4];
};

enum Mistake { outside_memory, outside_shared, outside_dynamic, misaligned, divergent_barrier, divergent_shuffle, uninitialised, absent_lane };

__global__ void mistaken(int mistake, float* x, int n) {
  extern __shared__ float dynamic[];
  __shared__ float fixed[32];
  const int thread = threadIdx.x;
  switch (mistake) {
    case outside_memory:
      x[n * (thread == 31)] = 1;
      break;
    case outside_shared:
      fixed[thread + 1] = 1;
      break;
    case outside_dynamic:
      dynamic[thread + 1] = 1;
      break;
    case misaligned:
      x[4] = reinterpret_cast<const Four*>(x + 1)->of[thread % 4];
      break;
    case divergent_barrier:
      if (thread < 31) {
        __syncthreads();
      }
      break;
    case divergent_shuffle:
      x[0] = thread < 31 ? __shfl_sync(0xffffffffu, 1.0f, 0) : 0;
      break;
    case uninitialised:
      if (blockIdx.x == 0) {
        fixed[thread] = dynamic[thread] = 1;
      }
      x[0] = fixed[thread] + dynamic[thread];
      break;
    case absent_lane:
      if (thread < 16) {
        x[0] = __shfl_sync(0xffffu, 1.0f, 16);
      }
      break;
  }
}

}  // namespace

template <typename... Expected, typename... Given>
int run(void (*kernel)(Expected...), dim3 grid, dim3 block, size_t bytes, Given... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = bytes;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

extern "C" int planted_softmax(const float* x, float* y, int64_t rows, int64_t n, int64_t threads) {
  return run(softmax, rows, threads, n * sizeof(float), x, y, static_cast<int>(n));
}

extern "C" int planted_indices(int32_t* out) { return run(indices, dim3(2, 3, 2), dim3(8, 4, 3), 0, out); }

extern "C" int planted_mistake(int64_t mistake, float* x, int64_t n) {
  return run(mistaken, 2, 32, 32 * sizeof(float), static_cast<int>(mistake), x, static_cast<int>(n));
}

// What the host's float16 and bfloat16 make of numbers, and the other way round.
extern "C" void planted_rounded(const double* x, int64_t n, __half* half, __nv_bfloat16* brain) {
  for (int64_t i = 0; i < n; ++i) {
    half[i] = __double2half(x[i]);
    brain[i] = __double2bfloat16(x[i]);
  }
}

extern "C" void planted_widened(const __half* half, const __nv_bfloat16* brain, int64_t n, float* of_half, float* of_brain) {
  for (int64_t i = 0; i < n; ++i) {
    of_half[i] = __half2float(half[i]);
    of_brain[i] = __bfloat162float(brain[i]);
  }
}
