// How are the rows of one image charged with vectors? Compiled once per instruction set.
#include "../simd.h"
#include "swapped_prediction_cpu.h"

namespace fuseer {
namespace CPU_CAPABILITY {
namespace {

template <typename scalar_t>
RowStatistics<Acc<scalar_t>> code(const void* data, int64_t k, double epsilon, const Columns<Acc<scalar_t>>& v, const void* next,
                                  Acc<scalar_t>* code) {
  using T = Acc<scalar_t>;
  const scalar_t* x = static_cast<const scalar_t*>(data);
  const Factor<T> factor(epsilon);
  Vec<T> widest_logit(-kInfinity<T>);
  over_row(x, k, T(0), [&](int64_t j, const Vec<T>& scores) {
    widest_logit = at_least(widest_logit, factor.logits(scores, Vec<T>::loadu(v.high + j)));
  });
  const T near = widest(widest_logit);
  const Vec<T> shift(-near);
  Vec<T> top(-kInfinity<T>);
  over_row(x, k, T(0), [&](int64_t j, const Vec<T>& scores) {
    // Potential and maximum may both be thousands, and a score may cancel either: nothing of their sum may be lost.
    const TwoSum<T> bias(Vec<T>::loadu(v.high + j), shift);
    const Vec<T> logits = factor.logits(scores, bias.sum) + (bias.lost + Vec<T>::loadu(v.low + j));
    logits.store(code + j);
    top = at_least(top, logits);
  });
  const Vec<T> tops(widest(top));
  Sum<T> sum;
  for (int64_t begin = 0; begin < k; begin += kChunk) {
    for (int64_t j = begin; j < k && j < begin + kChunk; j += Vec<T>::size()) {
      prefetch(static_cast<const scalar_t*>(next) + j);
      const Vec<T> e = power(Vec<T>::loadu(code + j) - tops);
      e.store(code + j);
      sum.part = sum.part + e;
    }
    sum.close();
  }
  const double all = sum.whole;
  const Vec<T> scale(static_cast<T>(1 / all));
  for (int64_t j = 0; j < k; j += Vec<T>::size()) {
    (Vec<T>::loadu(code + j) * scale).store(code + j);
  }
  return {static_cast<T>(kNats * (static_cast<double>(near) + widest(top))), static_cast<T>(std::log(all))};
}

template <typename scalar_t>
double charge(const void* data, int64_t k, double temperature, const Acc<scalar_t>* target, double targets, const void* next,
              RowStatistics<Acc<scalar_t>>* statistics) {
  using T = Acc<scalar_t>;
  const scalar_t* x = static_cast<const scalar_t*>(data);
  const Factor<T> factor(temperature);
  const T top = row_top(x, k);
  const Vec<T> tops(top);
  Sum<T> sum, dot;
  const auto close = [&] {
    sum.close();
    dot.close();
  };
  // What fills the row up is far below any score: its power is 0.
  constexpr T fill = std::numeric_limits<T>::lowest() / 2;
  if (target == nullptr) {
    over_chunks(x, k, fill, [&](int64_t, const Vec<T>& scores) { sum.part = sum.part + power(factor.below(scores, tops)); }, close);
  } else {
    const int64_t whole = k - k % Vec<T>::size();
    const auto step = [&](int64_t j, const Vec<T>& scores) {
      prefetch(static_cast<const scalar_t*>(next) + j);
      const Vec<T> logits = factor.below(scores, tops);
      sum.part = sum.part + power(logits);
      dot.part = j < whole ? at::vec::fmadd(Vec<T>::loadu(target + j), logits, dot.part) : dot.part + masked_product(target + j, logits, k - j);
    };
    over_chunks(x, k, fill, step, close);
  }
  const double log_sum = std::log(sum.whole);
  *statistics = {static_cast<T>(top / temperature), static_cast<T>(log_sum)};
  return targets * log_sum - kNats * dot.whole;
}

template <typename scalar_t>
void gradient(const void* data, int64_t k, double temperature, Acc<scalar_t> log_sum, const Acc<scalar_t>* target, double targets, double by,
              const void* next, bool stream, void* out) {
  using T = Acc<scalar_t>;
  const scalar_t* x = static_cast<const scalar_t*>(data);
  scalar_t* to = static_cast<scalar_t*>(out);
  const Factor<T> factor(temperature);
  const Vec<T> tops(row_top(x, k)), below(static_cast<T>(log_sum / kNats)), count(static_cast<T>(targets)), scale(static_cast<T>(by));
  alignas(64) T chunk[kChunk + 2 * kLanes];
  for (int64_t begin = 0; begin < k; begin += kChunk) {
    const int64_t left = k - begin < kChunk ? k - begin : kChunk;
    over_row(x + begin, left, T(0), [&](int64_t j, const Vec<T>& scores) {
      prefetch(static_cast<const scalar_t*>(next) + begin + j);
      const Vec<T> p = power(factor.below(scores, tops) - below);
      ((p * count - Vec<T>::loadu(target + begin + j)) * scale).store(chunk + j);
    });
    put(to + begin, chunk, left, stream);
  }
  fence_streams();
}

template <typename T>
void add(const T* x, int64_t k, T* sum) {
  for (int64_t j = 0; j < k; j += Vec<T>::size()) {
    (Vec<T>::loadu(sum + j) + Vec<T>::loadu(x + j)).store(sum + j);
  }
}

template <typename scalar_t>
constexpr SwappedKernels<Acc<scalar_t>> kernels_of() {
  return {code<scalar_t>, charge<scalar_t>, gradient<scalar_t>, add<Acc<scalar_t>>};
}

}  // namespace

extern const SwappedKernelSet swapped_kernels = {kernels_of<float>(), kernels_of<at::BFloat16>(), kernels_of<at::Half>(), kernels_of<double>()};

}  // namespace CPU_CAPABILITY
}  // namespace fuseer
