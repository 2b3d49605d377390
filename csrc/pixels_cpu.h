// What is done to the pixels of one view of one image? Declared once per instruction set, defined in pixels_cpu_simd.cpp.
#pragma once

#include "instruction_set.h"

#include <cstdint>

namespace fuseer {

// The bits of ViewPixels::steps; engine/data/pixels.py sets them.
enum PixelStep : int32_t { kFlip = 1, kBrightness = 2, kContrast = 4, kSaturation = 8, kHue = 16, kGray = 32, kBlur = 64, kSolarize = 128 };

struct ViewPixels {
  const uint8_t* pixels;  // [3, h, w]
  int64_t h, w;
  int32_t steps;
  float brightness, contrast, saturation, hue;
  const float* taps;  // 2 radius + 1 of them
  int64_t radius;
  const float *mean, *std;  // of the three channels, on the scale 0..255
  float* out;               // [3, h, w]
};

// Whole vectors that hold a row, and a row with its mirrored ends. Internal linkage: a weak symbol could come from the AVX-512 object.
constexpr int64_t kRowLanes = 64;
[[maybe_unused]] static int64_t padded_row(int64_t w) { return (w + kRowLanes - 1) / kRowLanes * kRowLanes; }
[[maybe_unused]] static int64_t mirrored_row(int64_t w, int64_t radius) { return padded_row(w) + padded_row(2 * radius) + kRowLanes; }

struct PixelKernels {
  // `scratch` holds 3 h padded_row(w) + mirrored_row(w, radius) + 3 padded_row(w) numbers.
  void (*augment)(const ViewPixels&, float* scratch);
};

FUSEER_DECLARE_KERNELS(PixelKernels, kPixels)

}  // namespace fuseer
