// How are a layer's squares summed, and its elements updated, by vectors? Compiled once per instruction set.
#include "../lists_simd.h"
#include "lars_update_cpu.h"

namespace fuseer {
namespace CPU_CAPABILITY {
namespace {

// Calls body(half, its numbers in float64) for each half of both vectors; once, with all, where they are float64 already.
template <typename T, typename Body>
inline void in_double(const Vec<T>& x, const Vec<T>& y, const Body& body) {
  if constexpr (std::is_same_v<T, double>) {
    body(0, x, y);
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    body(0, Vec<double>(_mm512_cvtps_pd(_mm512_castps512_ps256(x))), Vec<double>(_mm512_cvtps_pd(_mm512_castps512_ps256(y))));
    body(1, Vec<double>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))), Vec<double>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(y, 1))));
#elif defined(CPU_CAPABILITY_AVX2)
    body(0, Vec<double>(_mm256_cvtps_pd(_mm256_castps256_ps128(x))), Vec<double>(_mm256_cvtps_pd(_mm256_castps256_ps128(y))));
    body(1, Vec<double>(_mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))), Vec<double>(_mm256_cvtps_pd(_mm256_extractf128_ps(y, 1))));
#else
    constexpr int64_t lanes = Vec<double>::size();
    alignas(64) float narrow_x[2 * lanes], narrow_y[2 * lanes];
    x.store(narrow_x);
    y.store(narrow_y);
    for (int64_t half = 0; half < 2; ++half) {
      alignas(64) double wide_x[lanes], wide_y[lanes];
      for (int64_t j = 0; j < lanes; ++j) {
        wide_x[j] = narrow_x[half * lanes + j];
        wide_y[j] = narrow_y[half * lanes + j];
      }
      body(half, Vec<double>::loadu(wide_x), Vec<double>::loadu(wide_y));
    }
#endif
  }
}

template <typename T>
void squares(const Place& place, int64_t begin, int64_t end, double decay, double* sums) {
  // in float64 throughout: no gradient is too small or too large to be squared, and memory is slower than the conversion
  const Vec<double> none(0.0), decays(decay);
  Vec<double> w2[2] = {none, none}, g2[2] = {none, none}, both2[2] = {none, none};
  over_blocks(begin, end, [&](int64_t at, int64_t count) {
    alignas(64) T params[kChunk + 2 * kLanes], grads[kChunk + 2 * kLanes];
    const T* param = values_at(place.target, at, count, params);
    const T* grad = values_at(place.source, at, count, grads);
    for (int64_t j = 0; j < count; j += Vec<T>::size()) {
      in_double<T>(Vec<T>::loadu(param + j), Vec<T>::loadu(grad + j), [&](int half, const Vec<double>& w, const Vec<double>& g) {
        const Vec<double> both = at::vec::fmadd(decays, w, g);
        w2[half] = at::vec::fmadd(w, w, w2[half]);
        g2[half] = at::vec::fmadd(g, g, g2[half]);
        both2[half] = at::vec::fmadd(both, both, both2[half]);
      });
    }
  });
  sums[0] = total(w2[0] + w2[1]);
  sums[1] = total(g2[0] + g2[1]);
  sums[2] = total(both2[0] + both2[1]);
}

template <typename T, bool nesterov>
void update_as(const Place& place, int64_t begin, int64_t end, const LarsStep& step) {
  const Vec<T> decay(static_cast<T>(step.decay)), factor(static_cast<T>(step.factor)), momentum(static_cast<T>(step.momentum));
  const Vec<T> rate(static_cast<T>(-step.rate));
  over_blocks(begin, end, [&](int64_t at, int64_t count) {
    alignas(64) T params[kChunk + 2 * kLanes], grads[kChunk + 2 * kLanes], momenta[kChunk + 2 * kLanes];
    const T* param = values_at(place.target, at, count, params);
    const T* grad = values_at(place.source, at, count, grads);
    const T* moment = values_at(place.other, at, count, momenta);
    T* new_param = written_at(place.target, at, count, params);
    T* new_moment = written_at(place.other, at, count, momenta);
    for (int64_t j = 0; j < count; j += Vec<T>::size()) {
      const Vec<T> w = Vec<T>::loadu(param + j);
      const Vec<T> d = fused(decay, w, Vec<T>::loadu(grad + j)) * factor;
      const Vec<T> m = fused(momentum, Vec<T>::loadu(moment + j), d);
      m.store(new_moment + j);
      fused(rate, nesterov ? fused(momentum, m, d) : m, w).store(new_param + j);
    }
    if (new_param == params) {
      put_as(place.target, at, params, count, false);
    }
    if (new_moment == momenta) {
      put_as(place.other, at, momenta, count, false);
    }
  });
}

template <typename T>
void update(const Place& place, int64_t begin, int64_t end, const LarsStep& step) {
  step.nesterov ? update_as<T, true>(place, begin, end, step) : update_as<T, false>(place, begin, end, step);
}

}  // namespace

extern const LarsKernelSet lars_kernels = {{squares<float>, update<float>}, {squares<double>, update<double>}};

}  // namespace CPU_CAPABILITY
}  // namespace fuseer
