// What does one thread do with a run of score rows? Declared once per instruction set, defined in sinkhorn_cpu_simd.cpp.
#pragma once

#include <cstdint>

namespace fuseer {

enum class ScoreType { f32, bf16, f16 };

// `count` contiguous rows of `k` scores. Row buffers, column accumulators, `top` and `v` hold padded(k) floats,
// -infinity beyond k in the last two.
struct Rows {
  const void* data;
  ScoreType type;
  int64_t count;
  int64_t k;
  double epsilon;
};

constexpr int64_t kLanes = 16;  // floats of the widest vector register
constexpr int64_t padded(int64_t k) {
  return (k + kLanes - 1) / kLanes * kLanes;
}

struct SinkhornKernels {
  // top_k <- max(top_k, s_ik / epsilon)
  void (*column_max)(const Rows&, float* top);
  // e_ik <- exp(s_ik / epsilon - top_k), [count, k] unpadded; sums_k <- sums_k + e_ik; returns the least exponent (NaN if one is)
  float (*column_exp_sums)(const Rows&, const float* top, float* e, float* sums);
  // sums_k <- sums_k + softmax(s_i / epsilon + v)_k
  void (*column_softmax_sums)(const Rows&, const float* v, float* row, float* sums);
  // codes_ik <- softmax(s_i / epsilon + v)_k
  void (*row_softmax)(const Rows&, const float* v, float* row, float* codes);
  // sums_k <- sums_k + e_ik w_k / sum_j e_ij w_j; w is 0 beyond k
  void (*column_scaled_sums)(const float* e, int64_t count, int64_t k, const float* w, float* row, float* sums);
  // e_ik <- e_ik w_k / sum_j e_ij w_j
  void (*scale_rows)(float* e, int64_t count, int64_t k, const float* w, float* row);
};

namespace DEFAULT {
extern const SinkhornKernels sinkhorn_kernels;
}
#ifdef FUSEER_X86_SIMD
namespace AVX2 {
extern const SinkhornKernels sinkhorn_kernels;
}
namespace AVX512 {
extern const SinkhornKernels sinkhorn_kernels;
}
#endif

}  // namespace fuseer
