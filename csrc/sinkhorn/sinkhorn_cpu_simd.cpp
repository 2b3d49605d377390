// How is a run of rows swept with vectors? Compiled once per instruction set, with CPU_CAPABILITY naming it.
// No standard containers and no ATen beyond at::vec: a weak symbol from the AVX-512 object could replace the baseline's.
#include "sinkhorn_cpu.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <limits>

namespace fuseer {
namespace CPU_CAPABILITY {
namespace {

using Vec = at::vec::Vectorized<float>;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// 1/epsilon in two floats: one alone is off by 3e-8, which scores of 100 turn into 1e-4 of a code.
struct InverseEpsilon {
  explicit InverseEpsilon(double epsilon)
      : high(static_cast<float>(1.0 / epsilon)), low(static_cast<float>(1.0 / epsilon - static_cast<float>(1.0 / epsilon))) {}
  // The floor keeps a score of -infinity from meeting a negative `low`: infinity - infinity has no value.
  Vec logits(const Vec& scores, const Vec& bias) const {
    const Vec finite = at::vec::maximum(scores, Vec(std::numeric_limits<float>::lowest()));
    return at::vec::fmadd(finite, high, at::vec::fmadd(finite, low, bias));
  }
  Vec high, low;
};

template <typename scalar_t>
struct Load {
  static Vec full(const scalar_t* x) {
    Vec out;
    at::vec::load_to_float<scalar_t>(x, out);
    return out;
  }
};
template <>
struct Load<float> {
  static Vec full(const float* x) {
    return Vec::loadu(x);
  }
};

// Calls step(k, scores[k : k + lanes]) over a row; lanes beyond its end carry 0.
template <typename scalar_t, typename Step>
inline void over_row(const scalar_t* x, int64_t k, const Step& step) {
  const int64_t whole = k - k % Vec::size();
  for (int64_t j = 0; j < whole; j += Vec::size()) {
    step(j, Load<scalar_t>::full(x + j));
  }
  if (whole < k) {
    alignas(64) float tail[Vec::size()] = {};
    for (int64_t j = whole; j < k; ++j) {
      tail[j - whole] = static_cast<float>(x[j]);
    }
    step(whole, Vec::loadu(tail));
  }
}

inline float widest(const Vec& x) {
  alignas(64) float lanes[Vec::size()];
  x.store(lanes);
  float top = lanes[0];
  for (int64_t j = 1; j < Vec::size(); ++j) {
    top = lanes[j] > top || lanes[j] != lanes[j] ? lanes[j] : top;
  }
  return top;
}

inline float total(const Vec& x) {
  alignas(64) float lanes[Vec::size()];
  x.store(lanes);
  for (int64_t half = Vec::size() / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) {
      lanes[j] += lanes[j + half];
    }
  }
  return lanes[0];
}

// row <- exp(logits - their maximum); returns the sum.
template <typename scalar_t>
inline float exponentials(const scalar_t* x, int64_t k, const InverseEpsilon& inverse, const float* v, float* row) {
  Vec top(kMinusInfinity);
  over_row(x, k, [&](int64_t j, const Vec& scores) {
    const Vec logits = inverse.logits(scores, Vec::loadu(v + j));
    logits.store(row + j);
    top = at::vec::maximum(top, logits);
  });
  const Vec shift(widest(top));
  Vec sum(0.f);
  for (int64_t j = 0; j < k; j += Vec::size()) {
    const Vec e = (Vec::loadu(row + j) - shift).exp();
    e.store(row + j);
    sum = sum + e;
  }
  return total(sum);
}

template <typename scalar_t>
void column_max(const Rows& rows, float* top) {
  const InverseEpsilon inverse(rows.epsilon);
  const Vec zero(0.f);
  for (int64_t i = 0; i < rows.count; ++i) {
    over_row(static_cast<const scalar_t*>(rows.data) + i * rows.k, rows.k, [&](int64_t j, const Vec& scores) {
      at::vec::maximum(Vec::loadu(top + j), inverse.logits(scores, zero)).store(top + j);
    });
  }
}

inline int64_t lanes_left(int64_t j, int64_t k) {
  return k - j < Vec::size() ? k - j : Vec::size();
}

template <typename scalar_t>
float column_exp_sums(const Rows& rows, const float* top, float* e, float* sums) {
  const InverseEpsilon inverse(rows.epsilon);
  Vec least(std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < rows.count; ++i, e += rows.k) {
    over_row(static_cast<const scalar_t*>(rows.data) + i * rows.k, rows.k, [&](int64_t j, const Vec& scores) {
      const Vec exponent = inverse.logits(scores, Vec::loadu(top + j).neg());
      least = at::vec::minimum(least, exponent);
      const Vec x = exponent.exp();
      x.store(e + j, lanes_left(j, rows.k));
      (Vec::loadu(sums + j) + x).store(sums + j);
    });
  }
  return -widest(least.neg());
}

// row <- e * w; returns one over its sum.
inline Vec scaled_row(const float* e, int64_t k, const float* w, float* row) {
  Vec sum(0.f);
  for (int64_t j = 0; j < k; j += Vec::size()) {
    const Vec x = Vec::loadu(e + j, lanes_left(j, k)) * Vec::loadu(w + j);
    x.store(row + j);
    sum = sum + x;
  }
  return Vec(1.f / total(sum));
}

void column_scaled_sums(const float* e, int64_t count, int64_t k, const float* w, float* row, float* sums) {
  for (int64_t i = 0; i < count; ++i, e += k) {
    const Vec scale = scaled_row(e, k, w, row);
    for (int64_t j = 0; j < k; j += Vec::size()) {
      at::vec::fmadd(Vec::loadu(row + j), scale, Vec::loadu(sums + j)).store(sums + j);
    }
  }
}

void scale_rows(float* e, int64_t count, int64_t k, const float* w, float* row) {
  for (int64_t i = 0; i < count; ++i, e += k) {
    const Vec scale = scaled_row(e, k, w, row);
    for (int64_t j = 0; j < k; j += Vec::size()) {
      (Vec::loadu(row + j) * scale).store(e + j, lanes_left(j, k));
    }
  }
}

template <typename scalar_t>
void column_softmax_sums(const Rows& rows, const float* v, float* row, float* sums) {
  const InverseEpsilon inverse(rows.epsilon);
  for (int64_t i = 0; i < rows.count; ++i) {
    const Vec scale(1.f / exponentials(static_cast<const scalar_t*>(rows.data) + i * rows.k, rows.k, inverse, v, row));
    for (int64_t j = 0; j < rows.k; j += Vec::size()) {
      at::vec::fmadd(Vec::loadu(row + j), scale, Vec::loadu(sums + j)).store(sums + j);
    }
  }
}

template <typename scalar_t>
void row_softmax(const Rows& rows, const float* v, float* row, float* codes) {
  const InverseEpsilon inverse(rows.epsilon);
  for (int64_t i = 0; i < rows.count; ++i, codes += rows.k) {
    const Vec scale(1.f / exponentials(static_cast<const scalar_t*>(rows.data) + i * rows.k, rows.k, inverse, v, row));
    for (int64_t j = 0; j < rows.k; j += Vec::size()) {
      (Vec::loadu(row + j) * scale).store(codes + j, lanes_left(j, rows.k));
    }
  }
}

#define FUSEER_BY_TYPE(sweep, rows, ...)                 \
  (rows.type == ScoreType::f32        ? sweep<float>(rows, __VA_ARGS__)        \
       : rows.type == ScoreType::bf16 ? sweep<at::BFloat16>(rows, __VA_ARGS__) \
                                      : sweep<at::Half>(rows, __VA_ARGS__))

}  // namespace

extern const SinkhornKernels sinkhorn_kernels = {
    [](const Rows& rows, float* top) { FUSEER_BY_TYPE(column_max, rows, top); },
    [](const Rows& rows, const float* top, float* e, float* sums) { return FUSEER_BY_TYPE(column_exp_sums, rows, top, e, sums); },
    [](const Rows& rows, const float* v, float* row, float* sums) { FUSEER_BY_TYPE(column_softmax_sums, rows, v, row, sums); },
    [](const Rows& rows, const float* v, float* row, float* codes) { FUSEER_BY_TYPE(row_softmax, rows, v, row, codes); },
    column_scaled_sums,
    scale_rows,
};

}  // namespace CPU_CAPABILITY
}  // namespace fuseer
