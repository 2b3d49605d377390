// What does one thread do with a run of a teacher's elements? Declared once per instruction set, defined in ema_update_cpu_simd.cpp.
#pragma once

#include "../instruction_set.h"
#include "../rows.h"

namespace fuseer {

struct EmaKernels {
  // target <- momentum target + (1 - momentum) source for elements begin to end, and the new numbers into `other` where there is one
  void (*update)(const Place&, int64_t begin, int64_t end, double momentum, bool stream);
};

struct EmaKernelSet {
  EmaKernels of_float;
  EmaKernels of_double;
};

FUSEER_DECLARE_KERNELS(EmaKernelSet, ema_kernels)

}  // namespace fuseer
