// How does a program walk its part of a list of tensors, whatever their dtypes and alignment?
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fuseer {
namespace {

// A thread takes `share` elements of a block, which kernels/_chunks.py cuts lists into.
constexpr int threads = 256, share = 8, block_size = threads * share;

enum Kind : int { none, f32, bf16, f16, f64 };

// A piece of up to three tensors, as kernels/_chunks.py writes it: elements [start, stop) behind the addresses; program p takes `each`
// blocks from block origin + p * each on.
struct Row {
  void* data[3];
  int64_t start, stop, origin, each, layer, adapted, kind;

  __device__ Kind kind_of(int which) const { return static_cast<Kind>((kind >> (4 * which)) & 15); }
  __device__ bool has(Kind wanted) const { return kind_of(0) == wanted || kind_of(1) == wanted || kind_of(2) == wanted; }
  // 2^run elements of the smallest dtype fill the 16 bytes of one access; 0 where blocks do not begin at multiples of 16 bytes.
  __device__ int run() const { return (kind >> 12) == 0 ? 0 : has(bf16) || has(f16) ? 3 : has(f32) ? 2 : 1; }
};

// The rows of a launch, and the row of each program.
struct Lists {
  const Row* rows;
  const int32_t* owners;

  __device__ Row row() const { return rows[owners[blockIdx.x]]; }
};

// Which elements of a block a thread takes: runs of 2^run, and a warp's runs side by side, so that its accesses are side by side as well
// (eight float32 a thread in one run would have each store fill half of every 32-byte sector). Run 0: one by one, within the piece.
struct Place {
  int64_t begin, start, stop;
  int run;

  __device__ Place(const Row& row, int64_t block)
      : begin(block * block_size), start(row.start), stop(row.stop), run(start <= begin && begin + block_size <= stop ? row.run() : 0) {}

  __device__ int64_t of(int e) const {
    return begin + ((((e >> run) * threads + static_cast<int>(threadIdx.x)) << run) | (e & ((1 << run) - 1)));
  }
  __device__ bool holds(int64_t element) const { return start <= element && element < stop; }
};

// deed(place) for each of the program's blocks.
template <typename Deed>
__device__ inline void for_each_block(const Row& row, const Deed& deed) {
  const int64_t first = row.origin + blockIdx.x * row.each;
  for (int64_t block = first; block < first + row.each && block * block_size < row.stop; ++block) {
    deed(Place(row, block));
  }
}

__device__ inline float widened(float x) { return x; }
__device__ inline double widened(double x) { return x; }
__device__ inline float widened(__half x) { return __half2float(x); }
__device__ inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

// Each rounds once.
__device__ inline void round_to(float& to, float x) { to = x; }
__device__ inline void round_to(float& to, double x) { to = static_cast<float>(x); }
__device__ inline void round_to(double& to, double x) { to = x; }
__device__ inline void round_to(__half& to, float x) { to = __float2half_rn(x); }
__device__ inline void round_to(__half& to, double x) { to = __double2half(x); }
__device__ inline void round_to(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ inline void round_to(__nv_bfloat16& to, double x) { to = __double2bfloat16(x); }

// The 128 bits of one access.
template <typename T>
struct alignas(16) Wide {
  static constexpr int width = 16 / sizeof(T);
  T of[width];
};

template <typename Real, typename T>
__device__ inline void load_as(Real (&x)[share], const T* data, const Place& place) {
  if (place.run == 0) {
#pragma unroll
    for (int e = 0; e < share; ++e) {
      const int64_t at = place.of(e);
      x[e] = place.holds(at) ? static_cast<Real>(widened(data[at])) : Real(0);
    }
    return;
  }
  constexpr int width = Wide<T>::width;
#pragma unroll
  for (int e = 0; e < share; e += width) {
    const Wide<T> wide = *reinterpret_cast<const Wide<T>*>(data + place.of(e));
#pragma unroll
    for (int i = 0; i < width; ++i) {
      x[e + i] = static_cast<Real>(widened(wide.of[i]));
    }
  }
}

template <typename Real, typename T>
__device__ inline void store_as(T* data, const Real (&x)[share], const Place& place) {
  if (place.run == 0) {
#pragma unroll
    for (int e = 0; e < share; ++e) {
      const int64_t at = place.of(e);
      if (place.holds(at)) {
        round_to(data[at], x[e]);
      }
    }
    return;
  }
  constexpr int width = Wide<T>::width;
#pragma unroll
  for (int e = 0; e < share; e += width) {
    Wide<T> wide;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      round_to(wide.of[i], x[e + i]);
    }
    *reinterpret_cast<Wide<T>*>(data + place.of(e)) = wide;
  }
}

// A thread's elements of tensor `which` in arithmetic Real; 0 outside the piece. The kind is one for the whole block, so no warp diverges.
template <typename Real>
__device__ inline void load(Real (&x)[share], const Row& row, int which, const Place& place) {
  const void* data = row.data[which];
  // An address that comes out of memory could be anybody's; global accesses spare the hardware the look.
  __builtin_assume(__isGlobal(data));
  switch (row.kind_of(which)) {
    case f32:
      return load_as(x, static_cast<const float*>(data), place);
    case bf16:
      return load_as(x, static_cast<const __nv_bfloat16*>(data), place);
    case f16:
      return load_as(x, static_cast<const __half*>(data), place);
    default:
      return load_as(x, static_cast<const double*>(data), place);
  }
}

template <typename Real>
__device__ inline void store(const Row& row, int which, const Real (&x)[share], const Place& place) {
  void* data = row.data[which];
  __builtin_assume(__isGlobal(data));
  switch (row.kind_of(which)) {
    case f32:
      return store_as(static_cast<float*>(data), x, place);
    case bf16:
      return store_as(static_cast<__nv_bfloat16*>(data), x, place);
    case f16:
      return store_as(static_cast<__half*>(data), x, place);
    default:
      return store_as(static_cast<double*>(data), x, place);
  }
}

}  // namespace
}  // namespace fuseer
