// What does one thread do with a run of a layer's elements? Declared once per instruction set, defined in lars_update_cpu_simd.cpp.
#pragma once

#include "../instruction_set.h"
#include "../rows.h"

namespace fuseer {

// m <- momentum m + factor (g + decay w); w <- w - rate (m, or with nesterov factor (g + decay w) + momentum m)
struct LarsStep {
  double decay, factor, momentum, rate;
  bool nesterov;
};

// target, source, other: parameters, gradients, momenta
struct LarsKernels {
  // sums[0 : 3] <- those of w^2, g^2 and (g + decay w)^2 over elements begin to end
  void (*squares)(const Place&, int64_t begin, int64_t end, double decay, double* sums);
  void (*update)(const Place&, int64_t begin, int64_t end, const LarsStep&);
};

struct LarsKernelSet {
  LarsKernels of_float;
  LarsKernels of_double;
};

FUSEER_DECLARE_KERNELS(LarsKernelSet, lars_kernels)

}  // namespace fuseer
