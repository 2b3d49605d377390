// What does one thread do with one row of tokens? Declared once per instruction set, defined in unshuffle_tokens_cpu_simd.cpp.
#pragma once

#include "../instruction_set.h"
#include "../rows.h"

namespace fuseer {

template <typename T>
struct UnshuffleTokensKernels {
  // out <- x + addend, rounded to the type of x; `addend` holds padded(k) numbers
  void (*add)(const AnyRow& x, const T* addend, int64_t k, bool stream, void* out);
  // sums += x
  void (*accumulate)(const AnyRow& x, int64_t k, double* sums);
};

struct UnshuffleTokensKernelSet {
  UnshuffleTokensKernels<float> of_float;
  UnshuffleTokensKernels<double> of_double;
  void (*copy)(void* out, const void* x, int64_t bytes, bool stream);
};

FUSEER_DECLARE_KERNELS(UnshuffleTokensKernelSet, unshuffle_tokens_kernels)

}  // namespace fuseer
