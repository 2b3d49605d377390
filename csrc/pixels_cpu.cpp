// How does fuseer::augment_pixels run? Image by image in the thread that calls: a loader has threads of its own.
#include "library.h"
#include "pixels_cpu.h"

#include <c10/util/Exception.h>

#include <vector>

namespace fuseer {

void augment_pixels_cpu(const at::Tensor& pixels, const at::Tensor& steps, const at::Tensor& factors, const at::Tensor& taps,
                        const at::Tensor& radii, const at::Tensor& scale, const at::Tensor& out) {
  const int64_t B = pixels.size(0), h = pixels.size(2), w = pixels.size(3), longest = taps.size(1);
  TORCH_CHECK_VALUE(pixels.is_contiguous() && out.is_contiguous() && factors.is_contiguous() && taps.is_contiguous() &&
                        scale.is_contiguous() && pixels.size(1) == 3 && out.sizes() == pixels.sizes() && steps.numel() == B &&
                        radii.numel() == B && factors.numel() == 4 * B && taps.size(0) == B && scale.numel() == 6,
                    "augment_pixels: tensors must be contiguous, pixels and out [B, 3, h, w] of one shape, the parameters those of B = ", B,
                    " views; got pixels ", pixels.sizes(), ", out ", out.sizes(), " and taps ", taps.sizes());
  const int32_t *step = steps.const_data_ptr<int32_t>(), *radius = radii.const_data_ptr<int32_t>();
  const float *factor = factors.const_data_ptr<float>(), *tap = taps.const_data_ptr<float>(), *channel = scale.const_data_ptr<float>();
  const uint8_t* in = pixels.const_data_ptr<uint8_t>();
  float* to = out.mutable_data_ptr<float>();
  std::vector<float> scratch(3 * (h + 1) * padded_row(w) + mirrored_row(w, longest / 2));
  const PixelKernels& kernels = FUSEER_CHOSEN_KERNELS(kPixels);
  for (int64_t b = 0; b < B; ++b) {
    TORCH_CHECK_VALUE(radius[b] >= 0 && 2 * radius[b] + 1 <= longest, "augment_pixels: radius ", radius[b], " has no taps among ", longest);
    const float* f = factor + 4 * b;
    const int64_t first = b * 3 * h * w;
    kernels.augment({in + first, h, w, step[b], f[0], f[1], f[2], f[3], tap + b * longest + longest / 2 - radius[b], radius[b],
                     channel, channel + 3, to + first},
                    scratch.data());
  }
}

}  // namespace fuseer
