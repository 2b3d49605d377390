// How is one row of logits charged with its target by vectors? Compiled once per instruction set.
#include "../simd.h"
#include "soft_xent_cpu.h"

namespace fuseer {
namespace CPU_CAPABILITY {
namespace {

inline int64_t chunk_at(int64_t begin, int64_t k) {
  return k - begin < kChunk ? k - begin : kChunk;
}

// What stands beyond the end of a row of logits: its power is 0, and 0 times it is 0.
template <typename T>
inline T far_below(T top, double temperature) {
  return static_cast<T>(top - 1200 * kNats * temperature);
}

template <typename T>
inline T top_of(const AnyRow& x, int64_t k) {
  return with_type(x, [k](const auto* scores) { return static_cast<T>(row_top(scores, k)); });
}

// row <- (target - center) log2(e) / temperature - near, to the end of its last vector; returns the largest. `near` is the maximum of
// the first kChunk: what is small there loses no digits to what is subtracted.
template <typename T>
inline T target_logits(const AnyRow& target, int64_t k, const Sharpening<T>& sharpening, T* row, T& near) {
  const Factor<T> factor(sharpening.temperature);
  Vec<T> top(-kInfinity<T>);
  const auto sweep = [&](int64_t begin, int64_t end, const auto& step) {
    alignas(64) T chunk[kChunk];
    widen(target, begin, end - begin, T(0), chunk);
    for (int64_t j = begin; j < end; j += Vec<T>::size()) {
      step(j, Vec<T>::loadu(chunk + (j - begin)) - Vec<T>::loadu(sharpening.center + j));
    }
  };
  sweep(0, chunk_at(0, k), [&](int64_t, const Vec<T>& x) { top = at_least(top, factor.logits(x, Vec<T>(T(0)))); });
  near = widest(top);
  const Vec<T> shift(-near);
  top = Vec<T>(-kInfinity<T>);
  for (int64_t begin = 0; begin < k; begin += kChunk) {
    sweep(begin, begin + chunk_at(begin, k), [&](int64_t j, const Vec<T>& x) {
      const Vec<T> y = factor.logits(x, shift);
      y.store(row + j);
      top = at_least(top, y);
    });
  }
  return widest(top);
}

template <typename T>
double forward(const AnyRow& x, const AnyRow& target, int64_t k, double temperature, const Sharpening<T>& sharpening, T* row,
               XentStatistics<T>* statistics) {
  const bool sharpen = sharpening.temperature > 0;
  T near = 0;
  const T top = top_of<T>(x, k), target_top = sharpen ? target_logits(target, k, sharpening, row, near) : T(0);
  const Factor<T> factor(temperature);
  const Vec<T> tops(top), target_tops(target_top);
  alignas(64) T logits[kChunk], targets[kChunk];
  Sum<T> sum, target_sum, dot;
  for (int64_t begin = 0; begin < k; begin += kChunk) {
    const int64_t count = chunk_at(begin, k);
    widen(x, begin, count, far_below(top, temperature), logits);
    if (!sharpen) {
      widen(target, begin, count, T(0), targets);
    }
    for (int64_t j = 0; j < count; j += Vec<T>::size()) {
      const Vec<T> y = factor.below(Vec<T>::loadu(logits + j), tops);
      const Vec<T> q = sharpen ? power(Vec<T>::loadu(row + begin + j) - target_tops) : Vec<T>::loadu(targets + j);
      sum.part = sum.part + power(y);
      target_sum.part = target_sum.part + q;
      dot.part = at::vec::fmadd(q, y, dot.part);
    }
    sum.close();
    target_sum.close();
    dot.close();
  }
  const double log_sum = std::log(sum.whole), all = target_sum.whole;
  *statistics = {static_cast<T>(top / temperature), static_cast<T>(log_sum),
                 static_cast<T>(kNats * (static_cast<double>(near) + target_top)), static_cast<T>(sharpen ? std::log(all) : all)};
  return sharpen ? log_sum - kNats * dot.whole / all : all * log_sum - kNats * dot.whole;
}

template <typename scalar_t>
void backward_as(const AnyRow& x, const AnyRow& target, int64_t k, double temperature, const Sharpening<Acc<scalar_t>>& sharpening,
                 const XentStatistics<Acc<scalar_t>>& statistics, double by, bool stream, Acc<scalar_t>* row, void* out) {
  using T = Acc<scalar_t>;
  const bool sharpen = sharpening.temperature > 0;
  T near;
  const Vec<T> tops(top_of<T>(x, k)), target_tops(sharpen ? target_logits(target, k, sharpening, row, near) : T(0));
  const Factor<T> factor(temperature);
  const Vec<T> below(static_cast<T>(statistics.log_sum / kNats)), target_below(static_cast<T>(statistics.target_sum / kNats));
  const Vec<T> all(sharpen ? T(1) : statistics.target_sum), scale(static_cast<T>(by));
  alignas(64) T logits[kChunk], targets[kChunk], gradient[kChunk + 2 * kLanes];
  for (int64_t begin = 0; begin < k; begin += kChunk) {
    const int64_t count = chunk_at(begin, k);
    widen(x, begin, count, T(0), logits);
    if (!sharpen) {
      widen(target, begin, count, T(0), targets);
    }
    for (int64_t j = 0; j < count; j += Vec<T>::size()) {
      const Vec<T> p = power(factor.below(Vec<T>::loadu(logits + j), tops) - below);
      const Vec<T> q = sharpen ? power(Vec<T>::loadu(row + begin + j) - target_tops - target_below) : Vec<T>::loadu(targets + j);
      ((p * all - q) * scale).store(gradient + j);
    }
    put(static_cast<scalar_t*>(out) + begin, gradient, count, stream);
  }
  fence_streams();
}

void backward_of_float(const AnyRow& x, const AnyRow& target, int64_t k, double temperature, const Sharpening<float>& sharpening,
                       const XentStatistics<float>& statistics, double by, bool stream, float* row, void* out) {
  FUSEER_OF_FLOAT(x.type, backward_as, x, target, k, temperature, sharpening, statistics, by, stream, row, out)
}

}  // namespace

extern const SoftXentKernelSet soft_xent_kernels = {{forward<float>, backward_of_float}, {forward<double>, backward_as<double>}};

}  // namespace CPU_CAPABILITY
}  // namespace fuseer
