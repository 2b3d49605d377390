// How does a .cu file, compiled as ordinary C++, run its grids on the host, so that its mistakes show?
//
// Every CUDA thread is a fiber; a block's fibers run in turn, each until it waits at a barrier or shuffle, in an order that the test
// chooses. Blocks run one after another, and shared memory is all ones (NaN) when one begins. Not modelled: memory ordering, races
// within an instruction, alignment (UBSan sees to it), occupancy. Found beside wrong results: barriers and shuffles that not all threads
// reach, shuffles from lanes that do not take part (NaN), out-of-bounds accesses and leaks into other tensors (ASan).
#pragma once

#include <algorithm>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <ucontext.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
// ASan puts no red zones around variables with a section of their own.
#define __shared__ static
#else
#define __shared__ static __attribute__((section("shared_memory")))
#endif
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __builtin_assume(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

extern "C" {
// The section's ends, from the linker.
__attribute__((weak, visibility("hidden"))) extern char __start_shared_memory[], __stop_shared_memory[];
// The order in which a block's threads run: 0 as numbered, 1 reversed, otherwise shuffled by this seed whenever each had its turn.
__attribute__((weak)) int cuda_on_cpu_order = 0;
}

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_on_cpu {

constexpr unsigned warp_size = 32, most_threads = 1024;
#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t stack_size = 256 << 10;
#else
constexpr std::size_t stack_size = 64 << 10;
#endif

struct Fiber {
  std::unique_ptr<char[]> stack{new char[stack_size]};
  ucontext_t context;
  jmp_buf place;
  uint3 index{};
  bool begun = false, done = true;
};

// Lanes hand each other values through one of two rows in turn: the second cannot be overwritten before all lanes have read the first.
struct Warp {
  uint64_t values[2][warp_size];
  unsigned arrived = 0, generation = 0;
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::vector<char> dynamic;
  std::function<void()> kernel;
  Fiber* current = nullptr;
  ucontext_t scheduler_context;
  jmp_buf scheduler;
  unsigned threads = 0, arrived = 0, generation = 0;
  uint64_t progress = 0;
  std::string said;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_size = 0;
};
inline Machine machine;

// Switches are setjmp and longjmp, 12 times as fast as swapcontext with its system calls; ASan follows only the latter.
#ifdef __SANITIZE_ADDRESS__
inline void to_scheduler() {
  void* own = nullptr;
  __sanitizer_start_switch_fiber(&own, machine.scheduler_stack, machine.scheduler_stack_size);
  swapcontext(&machine.current->context, &machine.scheduler_context);
  __sanitizer_finish_switch_fiber(own, &machine.scheduler_stack, &machine.scheduler_stack_size);
}

inline void to_fiber(Fiber& fiber) {
  void* own = nullptr;
  __sanitizer_start_switch_fiber(&own, fiber.stack.get(), stack_size);
  swapcontext(&machine.scheduler_context, &fiber.context);
  __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
}
#else
inline void to_scheduler() {
  if (_setjmp(machine.current->place) == 0) {
    _longjmp(machine.scheduler, 1);
  }
}

inline void to_fiber(Fiber& fiber) {
  if (_setjmp(machine.scheduler) == 0) {
    if (fiber.begun) {
      _longjmp(fiber.place, 1);
    }
    fiber.begun = true;
    setcontext(&fiber.context);
  }
}
#endif

// A fiber's life: one thread of every block.
inline void live() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_size);
#endif
  for (;;) {
    machine.kernel();
    machine.current->done = true;
    ++machine.progress;
    to_scheduler();
  }
}

inline Fiber& fiber(unsigned number) {
  while (machine.fibers.size() <= number) {
    auto made = std::make_unique<Fiber>();
    getcontext(&made->context);
    made->context.uc_stack.ss_sp = made->stack.get();
    made->context.uc_stack.ss_size = stack_size;
    makecontext(&made->context, live, 0);
    machine.fibers.push_back(std::move(made));
  }
  return *machine.fibers[number];
}

// Whether all threads of the block came to an end.
inline bool run_block(const dim3& block, std::mt19937& random) {
#ifndef __SANITIZE_ADDRESS__
  std::memset(__start_shared_memory, 0xFF, static_cast<std::size_t>(__stop_shared_memory - __start_shared_memory));
#endif
  std::fill(machine.dynamic.begin(), machine.dynamic.end(), static_cast<char>(0xFF));
  machine.threads = block.x * block.y * block.z;
  machine.arrived = 0;
  machine.warps.assign((machine.threads + warp_size - 1) / warp_size, {});
  std::vector<unsigned> order(machine.threads);
  std::iota(order.begin(), order.end(), 0u);
  for (unsigned i : order) {
    fiber(i).done = false;
    fiber(i).index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  }
  if (cuda_on_cpu_order == 1) {
    std::reverse(order.begin(), order.end());
  }
  for (std::size_t alive = order.size(); alive > 0;) {
    if (cuda_on_cpu_order > 1) {
      std::shuffle(order.begin(), order.end(), random);
    }
    const uint64_t before = machine.progress;
    alive = 0;
    for (unsigned i : order) {
      Fiber& next = fiber(i);
      if (!next.done) {
        machine.current = &next;
        threadIdx = next.index;
        to_fiber(next);
        alive += !next.done;
      }
    }
    if (alive > 0 && machine.progress == before) {
      machine.said = "of " + std::to_string(machine.threads) + " threads of block " + std::to_string(blockIdx.x) + ", " +
                     std::to_string(alive) + " wait for ever at a barrier or shuffle that the others do not reach";
      return false;
    }
  }
  return true;
}

inline cudaError_t run_grid(const cudaLaunchConfig_t& config, std::function<void()> kernel) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > most_threads || uint64_t(grid.x) * grid.y * grid.z == 0) {
    return cudaErrorInvalidConfiguration;
  }
  machine.kernel = std::move(kernel);
  machine.dynamic = std::vector<char>(config.dynamicSmemBytes);
  gridDim = grid;
  blockDim = block;
  std::mt19937 random(static_cast<unsigned>(cuda_on_cpu_order));
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        if (!run_block(block, random)) {
          // Nobody can leave a thread that waits in the middle of a kernel; its stack is given up.
          machine.fibers.clear();
          return cudaErrorLaunchFailure;
        }
      }
    }
  }
  return cudaSuccess;
}

// Waits until all of `expected` have come to `arrived`.
inline void meet(unsigned& arrived, unsigned& generation, unsigned expected) {
  const unsigned mine = generation;
  if (++arrived == expected) {
    arrived = 0;
    ++generation;
    ++machine.progress;
  }
  while (generation == mine) {
    to_scheduler();
  }
}

inline unsigned thread_number() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

// What the lane `from` of the warp gave; all bits set where it takes no part.
template <typename T>
T exchanged(unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const unsigned thread = thread_number(), lane = thread % warp_size;
  Warp& warp = machine.warps[thread / warp_size];
  uint64_t* values = warp.values[warp.generation % 2];
  if (warp.arrived == 0) {
    std::memset(values, 0xFF, sizeof(warp.values[0]));
  }
  std::memcpy(&values[lane], &value, sizeof(T));
  meet(warp.arrived, warp.generation, static_cast<unsigned>(__builtin_popcount(mask)));
  std::memcpy(&value, &values[from % warp_size], sizeof(T));
  return value;
}

inline char* dynamic_shared() { return machine.dynamic.data(); }

}  // namespace cuda_on_cpu

extern "C" __attribute__((weak)) const char* cuda_on_cpu_said() { return cuda_on_cpu::machine.said.c_str(); }

template <typename... Expected, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Given&&... arguments) {
  // By value, as a launch takes them.
  const std::tuple<Expected...> taken(std::forward<Given>(arguments)...);
  return cuda_on_cpu::run_grid(*config, [&] { std::apply(kernel, taken); });
}

inline void __syncthreads() { cuda_on_cpu::meet(cuda_on_cpu::machine.arrived, cuda_on_cpu::machine.generation, cuda_on_cpu::machine.threads); }

inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_cpu::exchanged(mask, 0, 0); }

// Lanes of one segment of `width` lanes; a source outside the segment leaves a lane its own value.
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset, unsigned width = cuda_on_cpu::warp_size) {
  const unsigned lane = cuda_on_cpu::thread_number() % cuda_on_cpu::warp_size;
  return cuda_on_cpu::exchanged(mask, value, lane % width + offset < width ? lane + offset : lane);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned offset, unsigned width = cuda_on_cpu::warp_size) {
  const unsigned lane = cuda_on_cpu::thread_number() % cuda_on_cpu::warp_size;
  return cuda_on_cpu::exchanged(mask, value, lane % width >= offset ? lane - offset : lane);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned bits, unsigned width = cuda_on_cpu::warp_size) {
  const unsigned lane = cuda_on_cpu::thread_number() % cuda_on_cpu::warp_size, from = lane ^ bits;
  return cuda_on_cpu::exchanged(mask, value, from / width <= lane / width ? from : lane);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, unsigned from, unsigned width = cuda_on_cpu::warp_size) {
  const unsigned lane = cuda_on_cpu::thread_number() % cuda_on_cpu::warp_size;
  return cuda_on_cpu::exchanged(mask, value, lane / width * width + from % width);
}
