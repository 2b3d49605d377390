// What does one thread do with one masked patch? Declared once per instruction set, defined in masked_patch_mse_cpu_simd.cpp.
#pragma once

#include "../instruction_set.h"
#include "../rows.h"

namespace fuseer {

// The pixels of one patch where they lie: `data` is the first, strides are in elements.
struct PatchPixels {
  const void* data;
  ScoreType type;
  int64_t side, channels;
  int64_t row, column, channel;
  int64_t right;  // how many columns of the image lie right of the patch
  int64_t count() const { return side * side * channels; }
};

// Of a patch: target = (pixel - mean) * inverse.
template <typename T>
struct PatchStatistics {
  T mean, inverse;
};

template <typename T>
struct MaskedPatchMseKernels {
  // The mean of (pred - target)^2; `pixels` holds patch_buffer(n) numbers.
  double (*forward)(const PatchPixels&, const AnyRow& pred, bool normalize, T* pixels, PatchStatistics<T>*);
  // out <- factor (pred - target), rounded to the type of pred
  void (*backward)(const PatchPixels&, const AnyRow& pred, const PatchStatistics<T>&, double factor, bool stream, T* pixels, void* out);
  // Asks for the pixels of a patch that is compared later: rows of a patch are too far apart for the CPU to foresee them.
  void (*fetch)(const PatchPixels&);
  // The gradient of a row that is compared with nothing.
  void (*put_zeros)(void* out, int64_t bytes, bool stream);
};

struct MaskedPatchMseKernelSet {
  MaskedPatchMseKernels<float> of_float;
  MaskedPatchMseKernels<double> of_double;
};

// Room for the pixels of a patch, and for the vectors that reach beyond its end.
constexpr int64_t patch_buffer(int64_t n) {
  return padded(n) + 3 * kLanes;
}

FUSEER_DECLARE_KERNELS(MaskedPatchMseKernelSet, masked_patch_mse_kernels)

}  // namespace fuseer
