// What does one thread do with the rows of one image? Declared once per instruction set, defined in swapped_prediction_cpu_simd.cpp.
#pragma once

#include "../potentials_cpu.h"

namespace fuseer {

// Maximum and log-sum of a row of logits, in nats: log sum_k exp(x_k) = top + log_sum.
template <typename T>
struct RowStatistics {
  T top, log_sum;
};

// A row's data is of the type of its kernel set; every other row holds padded(k) numbers, and zeros beyond k. `next` is the row that will
// be read next: it comes from memory while this one is computed.
template <typename T>
struct SwappedKernels {
  // code <- softmax_2(x log2(e) / epsilon + v)
  RowStatistics<T> (*code)(const void* x, int64_t k, double epsilon, const Columns<T>& v, const void* next, T* code);
  // loss = -sum_k target_k log softmax(x / temperature)_k for a target that sums to `targets`
  double (*charge)(const void* x, int64_t k, double temperature, const T* target, double targets, const void* next, RowStatistics<T>*);
  // gradient <- factor (targets softmax(x / temperature) - target), rounded to the type of x
  void (*gradient)(const void* x, int64_t k, double temperature, T log_sum, const T* target, double targets, double factor,
                   const void* next, bool stream, void* gradient);
  // sum <- sum + x
  void (*add)(const T* x, int64_t k, T* sum);
};

struct SwappedKernelSet {
  SwappedKernels<float> of_f32, of_bf16, of_f16;
  SwappedKernels<double> of_f64;
};

FUSEER_DECLARE_KERNELS(SwappedKernelSet, swapped_kernels)

}  // namespace fuseer
