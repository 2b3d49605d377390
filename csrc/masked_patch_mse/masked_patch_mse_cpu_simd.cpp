// How is a masked patch compared with its prediction by vectors? Compiled once per instruction set.
#include "../simd.h"
#include "masked_patch_mse_cpu.h"

namespace fuseer {
namespace CPU_CAPABILITY {
namespace {

constexpr double kEps = 1e-6;

// out[3 * lanes] <- a0 b0 c0 a1 b1 c1 …
inline void interleave(const Vec<float>& a, const Vec<float>& b, const Vec<float>& c, float* out) {
#if defined(CPU_CAPABILITY_AVX512)
  // of the 16 places of each third, which hold a or b (16 + lane), and then which of those give way to c
  const __m512i ab0 = _mm512_setr_epi32(0, 16, 0, 1, 17, 0, 2, 18, 0, 3, 19, 0, 4, 20, 0, 5);
  const __m512i ab1 = _mm512_setr_epi32(21, 0, 6, 22, 0, 7, 23, 0, 8, 24, 0, 9, 25, 0, 10, 26);
  const __m512i ab2 = _mm512_setr_epi32(0, 11, 27, 0, 12, 28, 0, 13, 29, 0, 14, 30, 0, 15, 31, 0);
  const __m512i c0 = _mm512_setr_epi32(0, 1, 16, 3, 4, 17, 6, 7, 18, 9, 10, 19, 12, 13, 20, 15);
  const __m512i c1 = _mm512_setr_epi32(0, 21, 2, 3, 22, 5, 6, 23, 8, 9, 24, 11, 12, 25, 14, 15);
  const __m512i c2 = _mm512_setr_epi32(26, 1, 2, 27, 4, 5, 28, 7, 8, 29, 10, 11, 30, 13, 14, 31);
  _mm512_storeu_ps(out, _mm512_permutex2var_ps(_mm512_permutex2var_ps(a, ab0, b), c0, c));
  _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(_mm512_permutex2var_ps(a, ab1, b), c1, c));
  _mm512_storeu_ps(out + 32, _mm512_permutex2var_ps(_mm512_permutex2var_ps(a, ab2, b), c2, c));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i of_a = _mm256_setr_epi32(0, 3, 6, 1, 4, 7, 2, 5);
  const __m256i of_b = _mm256_setr_epi32(5, 0, 3, 6, 1, 4, 7, 2);
  const __m256i of_c = _mm256_setr_epi32(2, 5, 0, 3, 6, 1, 4, 7);
  const __m256 x = _mm256_permutevar8x32_ps(a, of_a), y = _mm256_permutevar8x32_ps(b, of_b), z = _mm256_permutevar8x32_ps(c, of_c);
  _mm256_storeu_ps(out, _mm256_blend_ps(_mm256_blend_ps(x, y, 0x92), z, 0x24));
  _mm256_storeu_ps(out + 8, _mm256_blend_ps(_mm256_blend_ps(x, y, 0x24), z, 0x49));
  _mm256_storeu_ps(out + 16, _mm256_blend_ps(_mm256_blend_ps(x, y, 0x49), z, 0x92));
#else
  alignas(64) float lanes[3][Vec<float>::size()];
  a.store(lanes[0]);
  b.store(lanes[1]);
  c.store(lanes[2]);
  for (int64_t j = 0; j < 3 * Vec<float>::size(); ++j) {
    out[j] = lanes[j % 3][j / 3];
  }
#endif
}

// One row of pixels of three planes, channel by channel; what is written beyond it belongs to the next row, or to nobody.
template <typename scalar_t>
inline void row_of_planes(const scalar_t* a, const scalar_t* b, const scalar_t* c, int64_t count, int64_t readable, float* out) {
  constexpr int64_t lanes = Vec<float>::size();
  for (int64_t j = 0; j < count; j += lanes, a += lanes, b += lanes, c += lanes, out += 3 * lanes) {
    if (j + lanes <= readable) {
      interleave(read(a), read(b), read(c), out);
    } else {
      interleave(read(a, count - j, 0.f), read(b, count - j, 0.f), read(c, count - j, 0.f), out);
    }
  }
}

// out <- the pixels of a patch in the order row, column, channel
template <typename T, typename scalar_t>
void gather_as(const PatchPixels& patch, const scalar_t* x, T* out) {
  const int64_t width = patch.side * patch.channels;
  if ((patch.channels == 1 || patch.channel == 1) && (patch.side == 1 || patch.column == patch.channels)) {
    for (int64_t i = 0; i < patch.side; ++i) {
      widen_as(x + i * patch.row, width, T(0), out + i * width);
    }
    return;
  }
  if constexpr (std::is_same_v<T, float> && !std::is_same_v<scalar_t, double>) {
    if (patch.channels == 3 && patch.column == 1) {
      for (int64_t i = 0; i < patch.side; ++i) {
        const scalar_t* row = x + i * patch.row;
        row_of_planes(row, row + patch.channel, row + 2 * patch.channel, patch.side, patch.side + patch.right, out + i * width);
      }
      return;
    }
  }
  for (int64_t i = 0; i < patch.side; ++i) {
    for (int64_t j = 0; j < patch.side; ++j) {
      const scalar_t* pixel = x + i * patch.row + j * patch.column;
      for (int64_t c = 0; c < patch.channels; ++c) {
        out[(i * patch.side + j) * patch.channels + c] = static_cast<T>(pixel[c * patch.channel]);
      }
    }
  }
}

void fetch(const PatchPixels& patch) {
  const bool mixed = patch.channel == 1;
  const int64_t element = bytes_of(patch.type), bytes = patch.side * element * (mixed ? patch.channels : 1);
  for (int64_t i = 0; i < patch.side; ++i) {
    for (int64_t c = 0; c < (mixed ? 1 : patch.channels); ++c) {
      const char* segment = static_cast<const char*>(patch.data) + (i * patch.row + c * patch.channel) * element;
      for (int64_t b = 0; b < bytes + 63; b += 64) {
        prefetch(segment + (b < bytes ? b : bytes - 1));
      }
    }
  }
}

template <typename T>
inline void gather(const PatchPixels& patch, T* out) {
  with_type(AnyRow{patch.data, patch.type}, [&](const auto* x) { gather_as(patch, x, out); });
}

// x[n : padded(n)] <- value
template <typename T>
inline void fill_up(T* x, int64_t n, T value) {
  for (int64_t j = n; j < padded(n); ++j) {
    x[j] = value;
  }
}

template <typename T>
inline double in_double(const Vec<T>& x) {
  alignas(64) T lanes[Vec<T>::size()];
  x.store(lanes);
  double sum = 0;
  for (const T lane : lanes) {
    sum += lane;
  }
  return sum;
}

// Mean and 1 / sqrt(unbiased variance + eps). The sum goes with what its roundings lost, for of a patch of little contrast the target is
// a thousand times the distance from its mean: where all pixels are equal, that is 0.
template <typename T>
inline PatchStatistics<T> statistics_of(T* pixels, int64_t n) {
  Vec<T> sum(T(0)), lost(T(0));
  fill_up(pixels, n, T(0));
  over_row(pixels, padded(n), T(0), [&](int64_t, const Vec<T>& x) {
    const TwoSum<T> next(sum, x);
    sum = next.sum;
    lost = lost + next.lost;
  });
  const double whole = in_double(sum) + in_double(lost);
  const T mean = static_cast<T>(whole / n);
  const Vec<T> means(mean);
  fill_up(pixels, n, mean);
  Sum<T> square;
  over_chunks(
      pixels, padded(n), T(0),
      [&](int64_t, const Vec<T>& x) {
        const Vec<T> distance = x - means;
        square.part = at::vec::fmadd(distance, distance, square.part);
      },
      [&] { square.close(); });
  return {mean, static_cast<T>(1 / std::sqrt(square.whole / (n - 1) + kEps))};
}

template <typename scalar_t>
double forward_as(const PatchPixels& patch, const AnyRow& pred, bool normalize, Acc<scalar_t>* pixels, PatchStatistics<Acc<scalar_t>>* statistics) {
  using T = Acc<scalar_t>;
  const int64_t n = patch.count();
  gather(patch, pixels);
  *statistics = normalize ? statistics_of(pixels, n) : PatchStatistics<T>{T(0), T(1)};
  // their target is 0, as is the prediction beyond the end of its row
  fill_up(pixels, n, statistics->mean);
  const Vec<T> mean(statistics->mean), inverse(statistics->inverse);
  Sum<T> square;
  over_chunks(
      static_cast<const scalar_t*>(pred.data), n, T(0),
      [&](int64_t j, const Vec<T>& x) {
        const Vec<T> error = x - (Vec<T>::loadu(pixels + j) - mean) * inverse;
        square.part = at::vec::fmadd(error, error, square.part);
      },
      [&] { square.close(); });
  return square.whole / n;
}

double forward_of_float(const PatchPixels& patch, const AnyRow& pred, bool normalize, float* pixels, PatchStatistics<float>* statistics) {
  FUSEER_OF_FLOAT(pred.type, forward_as, patch, pred, normalize, pixels, statistics)
}

template <typename scalar_t>
void backward_as(const PatchPixels& patch, const AnyRow& pred, const PatchStatistics<Acc<scalar_t>>& statistics, double factor, bool stream,
                 Acc<scalar_t>* pixels, void* out) {
  using T = Acc<scalar_t>;
  const int64_t n = patch.count();
  gather(patch, pixels);
  const Vec<T> mean(statistics.mean), inverse(statistics.inverse), scale(static_cast<T>(factor));
  over_row(static_cast<const scalar_t*>(pred.data), n, T(0), [&](int64_t j, const Vec<T>& x) {
    ((x - (Vec<T>::loadu(pixels + j) - mean) * inverse) * scale).store(pixels + j);
  });
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    put(static_cast<scalar_t*>(out) + begin, pixels + begin, n - begin < kChunk ? n - begin : kChunk, stream);
  }
  fence_streams();
}

void backward_of_float(const PatchPixels& patch, const AnyRow& pred, const PatchStatistics<float>& statistics, double factor, bool stream,
                       float* pixels, void* out) {
  FUSEER_OF_FLOAT(pred.type, backward_as, patch, pred, statistics, factor, stream, pixels, out)
}

void put_zeros(void* out, int64_t bytes, bool stream) {
  alignas(64) static const char zeros[4096] = {};
  for (int64_t begin = 0; begin < bytes; begin += 4096) {
    put_bytes(static_cast<char*>(out) + begin, zeros, bytes - begin < 4096 ? bytes - begin : 4096, stream);
  }
  fence_streams();
}

}  // namespace

extern const MaskedPatchMseKernelSet masked_patch_mse_kernels = {
    {forward_of_float, backward_of_float, fetch, put_zeros}, {forward_as<double>, backward_as<double>, fetch, put_zeros}};

}  // namespace CPU_CAPABILITY
}  // namespace fuseer
