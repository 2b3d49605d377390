// How are the pixels of a view coloured, blurred and normalised by vectors? Compiled once per instruction set, to the same bits.
#include "pixels_cpu.h"
#include "simd.h"

namespace fuseer {
namespace CPU_CAPABILITY {
namespace {

// The nearest whole number in 0..255, halves to the even one: 1.5 2^23 leaves no bits for a fraction.
inline Vec<float> eight_bit(const Vec<float>& x) {
  const Vec<float> inside = at::vec::minimum(at::vec::maximum(x, Vec<float>(0.f)), Vec<float>(255.f)), whole(12582912.f);
  return (inside + whole) - whole;
}

inline Vec<float> luma(const Vec<float>& r, const Vec<float>& g, const Vec<float>& b) {
  return r * Vec<float>(0.299f) + g * Vec<float>(0.587f) + b * Vec<float>(0.114f);
}

// One row of three channels. Rows are whole vectors long; what lies beyond w is computed and never looked at.
struct Row {
  float *r, *g, *b;
  int64_t size;
};

// x <- to(x). Vectors by hand: GCC 12 turns no loop with a choice in it into AVX2, as a comparison could trap.
template <typename Change>
inline void change(float* x, int64_t size, const Change& to) {
  for (int64_t i = 0; i < size; i += Vec<float>::size()) {
    to(Vec<float>::loadu(x + i)).store(x + i);
  }
}

template <typename Change>
inline void change(const Row& row, const Change& to) {
  for (float* x : {row.r, row.g, row.b}) {
    change(x, row.size, [&](const Vec<float>& x) { return eight_bit(to(x)); });
  }
}

// to(r, g, b) stores what it makes of the channels at i.
template <typename Change>
inline void change_together(const Row& row, const Change& to) {
  for (int64_t i = 0; i < row.size; i += Vec<float>::size()) {
    to(Vec<float>::loadu(row.r + i), Vec<float>::loadu(row.g + i), Vec<float>::loadu(row.b + i), i);
  }
}

// Beyond w there are zeros at this time; each lane's sum of whole numbers is exact, for it stays below 2^24.
inline int64_t gray_sum(const Row& row) {
  constexpr int64_t n = Vec<float>::size();
  Vec<float> sums(0.f);
  change_together(row, [&](const Vec<float>& r, const Vec<float>& g, const Vec<float>& b, int64_t) {
    sums = sums + eight_bit(luma(r, g, b));
  });
  float lanes[n];
  sums.store(lanes);
  int64_t sum = 0;
  for (float lane : lanes) {
    sum += static_cast<int64_t>(lane);
  }
  return sum;
}

inline void saturate(const Row& row, const Vec<float>& factor) {
  change_together(row, [&](const Vec<float>& r, const Vec<float>& g, const Vec<float>& b, int64_t i) {
    const Vec<float> gray = luma(r, g, b);
    eight_bit(gray + factor * (r - gray)).store(row.r + i);
    eight_bit(gray + factor * (g - gray)).store(row.g + i);
    eight_bit(gray + factor * (b - gray)).store(row.b + i);
  });
}

inline void make_gray(const Row& row) {
  change_together(row, [&](const Vec<float>& r, const Vec<float>& g, const Vec<float>& b, int64_t i) {
    const Vec<float> gray = eight_bit(luma(r, g, b));
    for (float* x : {row.r, row.g, row.b}) {
      gray.store(x + i);
    }
  });
}

// v - c clip(min(k, 4 - k), 0, 1) with k modulo 6; k is in [-4, 13].
inline Vec<float> hue_channel(Vec<float> k, const Vec<float>& v, const Vec<float>& c) {
  const Vec<float> zero(0.f), six(6.f), twelve(12.f);
  k = Vec<float>::blendv(Vec<float>::blendv(k, k - six, k >= six), k - twelve, k >= twelve);
  k = Vec<float>::blendv(k, k + six, k < zero);
  const Vec<float> part = at::vec::minimum(at::vec::maximum(at::vec::minimum(k, Vec<float>(4.f) - k), zero), Vec<float>(1.f));
  return eight_bit(v - c * part);
}

inline void shift_hue(const Row& row, float turns) {
  const Vec<float> shift(6.f * turns), zero(0.f), one(1.f), two(2.f), four(4.f);
  change_together(row, [&](const Vec<float>& r, const Vec<float>& g, const Vec<float>& b, int64_t i) {
    const Vec<float> v = at::vec::maximum(at::vec::maximum(r, g), b), c = v - at::vec::minimum(at::vec::minimum(r, g), b);
    const Vec<float> is_r = v == r, is_g = v == g;
    const Vec<float> difference = Vec<float>::blendv(Vec<float>::blendv(r - g, b - r, is_g), g - b, is_r);
    const Vec<float> sixth = Vec<float>::blendv(Vec<float>::blendv(four, two, is_g), zero, is_r);
    const Vec<float> hue = sixth + difference / at::vec::maximum(c, one) + shift;
    hue_channel(hue + Vec<float>(5.f), v, c).store(row.r + i);
    hue_channel(hue + Vec<float>(3.f), v, c).store(row.g + i);
    hue_channel(hue + one, v, c).store(row.b + i);
  });
}

inline int64_t mirrored(int64_t i, int64_t size) {
  if (size == 1) {
    return 0;
  }
  const int64_t period = 2 * size - 2;
  i = (i % period + period) % period;
  return i < size ? i : period - i;
}

// out[i] = sum over k of taps[k] at(k)[i], in the order of k.
template <typename Source>
inline void weighted(const float* taps, int64_t count, int64_t size, const Source& at, float* out) {
  constexpr int64_t n = Vec<float>::size();
  for (int64_t i = 0; i < size; i += 4 * n) {
    Vec<float> s0(0.f), s1(0.f), s2(0.f), s3(0.f);
    for (int64_t k = 0; k < count; ++k) {
      const Vec<float> tap(taps[k]);
      const float* x = at(k) + i;
      s0 = s0 + tap * Vec<float>::loadu(x);
      s1 = s1 + tap * Vec<float>::loadu(x + n);
      s2 = s2 + tap * Vec<float>::loadu(x + 2 * n);
      s3 = s3 + tap * Vec<float>::loadu(x + 3 * n);
    }
    s0.store(out + i);
    s1.store(out + i + n);
    s2.store(out + i + 2 * n);
    s3.store(out + i + 3 * n);
  }
}

// Row y of one blurred channel: down the columns first, then along the row, which `wide` holds with its mirrored ends.
inline void blur_row(const ViewPixels& view, const float* plane, int64_t y, float* wide, float* row) {
  const int64_t radius = view.radius, count = 2 * radius + 1, size = padded_row(view.w);
  float* middle = wide + radius;
  weighted(view.taps, count, size, [&](int64_t k) { return plane + mirrored(y + k - radius, view.h) * size; }, middle);
  for (int64_t i = 1; i <= radius; ++i) {
    wide[radius - i] = middle[mirrored(-i, view.w)];
    middle[view.w + i - 1] = middle[mirrored(view.w + i - 1, view.w)];
  }
  weighted(view.taps, count, size, [&](int64_t k) { return wide + k; }, row);
  change(row, size, [](const Vec<float>& x) { return eight_bit(x); });
}

inline void load(const ViewPixels& view, int64_t y, const Row& row) {
  for (int c = 0; c < 3; ++c) {
    const uint8_t* in = view.pixels + (c * view.h + y) * view.w;
    float* x = c == 0 ? row.r : c == 1 ? row.g : row.b;
    if (view.steps & kFlip) {
      for (int64_t i = 0; i < view.w; ++i) {
        x[i] = static_cast<float>(in[view.w - 1 - i]);
      }
    } else {
      for (int64_t i = 0; i < view.w; ++i) {
        x[i] = static_cast<float>(in[i]);
      }
    }
    for (int64_t i = view.w; i < row.size; ++i) {
      x[i] = 0.f;
    }
  }
}

inline void store(const ViewPixels& view, int64_t y, const Row& row) {
  for (int c = 0; c < 3; ++c) {
    float* x = c == 0 ? row.r : c == 1 ? row.g : row.b;
    float* out = view.out + (c * view.h + y) * view.w;
    if (view.steps & kSolarize) {
      const Vec<float> middle(128.f), most(255.f);
      change(x, row.size, [&](const Vec<float>& x) { return Vec<float>::blendv(x, most - x, x >= middle); });
    }
    const float mean = view.mean[c], std = view.std[c];
    for (int64_t i = 0; i < view.w; ++i) {
      out[i] = (x[i] - mean) / std;
    }
  }
}

void augment(const ViewPixels& view, float* scratch) {
  const int64_t size = padded_row(view.w), plane = view.h * size;
  const auto row_at = [&](int64_t y) { return Row{scratch + y * size, scratch + plane + y * size, scratch + 2 * plane + y * size, size}; };
  int64_t sum = 0;
  for (int64_t y = 0; y < view.h; ++y) {
    const Row row = row_at(y);
    load(view, y, row);
    if (view.steps & kBrightness) {
      change(row, [&](const Vec<float>& x) { return x * Vec<float>(view.brightness); });
    }
    sum += view.steps & kContrast ? gray_sum(row) : 0;
  }
  const Vec<float> pivot(static_cast<float>(static_cast<double>(sum) / static_cast<double>(view.h * view.w))), factor(view.contrast);
  for (int64_t y = 0; y < view.h; ++y) {
    const Row row = row_at(y);
    if (view.steps & kContrast) {
      change(row, [&](const Vec<float>& x) { return pivot + factor * (x - pivot); });
    }
    if (view.steps & kSaturation) {
      saturate(row, Vec<float>(view.saturation));
    }
    if (view.steps & kHue) {
      shift_hue(row, view.hue);
    }
    if (view.steps & kGray) {
      make_gray(row);
    }
    if (!(view.steps & kBlur)) {
      store(view, y, row);
    }
  }
  if (!(view.steps & kBlur)) {
    return;
  }
  float* wide = scratch + 3 * plane;
  float* blurred = wide + mirrored_row(view.w, view.radius);
  for (int64_t y = 0; y < view.h; ++y) {
    for (int64_t c = 0; c < 3; ++c) {
      blur_row(view, scratch + c * plane, y, wide, blurred + c * size);
    }
    store(view, y, {blurred, blurred + size, blurred + 2 * size, size});
  }
}

}  // namespace

extern const PixelKernels kPixels = {augment};

}  // namespace CPU_CAPABILITY
}  // namespace fuseer
