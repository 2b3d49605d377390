// What does one thread do with one row of logits and its target? Declared once per instruction set, defined in soft_xent_cpu_simd.cpp.
#pragma once

#include "../instruction_set.h"
#include "../rows.h"

namespace fuseer {

// How a target becomes a distribution: as it is (temperature 0), or by softmax((target - center) / temperature).
template <typename T>
struct Sharpening {
  double temperature;
  const T* center;  // padded(k) numbers, zeros where nothing is subtracted, -kAbsent beyond k
};

// Of a row, in nats: maximum and log-sum of the logits; the same of the target's logits, or 0 and the sum of the target.
template <typename T>
struct XentStatistics {
  T top, log_sum, target_top, target_sum;
};

template <typename T>
struct SoftXentKernels {
  // -sum_k q_k log softmax(x / temperature)_k; `row` holds padded(k) numbers
  double (*forward)(const AnyRow& x, const AnyRow& target, int64_t k, double temperature, const Sharpening<T>&, T* row, XentStatistics<T>*);
  // out <- factor (sum_k q_k softmax(x / temperature) - q), rounded to the type of x
  void (*backward)(const AnyRow& x, const AnyRow& target, int64_t k, double temperature, const Sharpening<T>&, const XentStatistics<T>&,
                   double factor, bool stream, T* row, void* out);
};

struct SoftXentKernelSet {
  SoftXentKernels<float> of_float;
  SoftXentKernels<double> of_double;
};

FUSEER_DECLARE_KERNELS(SoftXentKernelSet, soft_xent_kernels)

}  // namespace fuseer
