// How do the vectors of one instruction set load and store rows of any type, and take powers of two?
// Included by csrc/**/*_simd.cpp alone, each compiled once per instruction set, with CPU_CAPABILITY naming it. No standard
// containers and no ATen beyond at::vec: a weak symbol from the AVX-512 object could replace the baseline's.
#pragma once

#include "rows.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

namespace fuseer {
namespace CPU_CAPABILITY {
namespace {

template <typename T>
using Vec = at::vec::Vectorized<T>;

// The type of the arithmetic on scores of a type.
template <typename scalar_t>
using Acc = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <typename scalar_t>
inline Vec<Acc<scalar_t>> read(const scalar_t* x) {
  if constexpr (std::is_same_v<scalar_t, Acc<scalar_t>>) {
    return Vec<scalar_t>::loadu(x);
  } else {
    Vec<float> out;
    at::vec::load_to_float<scalar_t>(x, out);
    return out;
  }
}

// The first `left` lanes of a vector, `fill` in the others.
template <typename scalar_t>
inline Vec<Acc<scalar_t>> read(const scalar_t* x, int64_t left, Acc<scalar_t> fill) {
  using T = Acc<scalar_t>;
  alignas(64) T lanes[Vec<T>::size()];
  for (int64_t j = 0; j < Vec<T>::size(); ++j) {
    lanes[j] = j < left ? static_cast<T>(x[j]) : fill;
  }
  return Vec<T>::loadu(lanes);
}

// Asks for the cache line of x while something else is computed; any address will do.
inline void prefetch(const void* x) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_prefetch(static_cast<const char*>(x), _MM_HINT_T1);
#endif
}

// Calls step(j, x[j : j + lanes]) over a row; lanes beyond its end hold `fill`.
template <typename scalar_t, typename Step>
inline void over_row(const scalar_t* x, int64_t k, Acc<scalar_t> fill, const Step& step) {
  constexpr int64_t lanes = Vec<Acc<scalar_t>>::size();
  int64_t j = 0;
  for (; j + lanes <= k; j += lanes) {
    step(j, read(x + j));
  }
  if (j < k) {
    step(j, read(x + j, k - j, fill));
  }
}

// The same, and close() after every kChunk and at the end.
template <typename scalar_t, typename Step, typename Close>
inline void over_chunks(const scalar_t* x, int64_t k, Acc<scalar_t> fill, const Step& step, const Close& close) {
  for (int64_t begin = 0; begin < k; begin += kChunk) {
    const int64_t left = k - begin < kChunk ? k - begin : kChunk;
    over_row(x + begin, left, fill, [&](int64_t j, const Vec<Acc<scalar_t>>& values) { step(begin + j, values); });
    close();
  }
}

template <typename T>
inline T widest(const Vec<T>& x) {
  alignas(64) T lanes[Vec<T>::size()];
  x.store(lanes);
  T top = lanes[0];
  for (int64_t j = 1; j < Vec<T>::size(); ++j) {
    top = lanes[j] > top || lanes[j] != lanes[j] ? lanes[j] : top;
  }
  return top;
}

template <typename T>
inline T total(const Vec<T>& x) {
  alignas(64) T lanes[Vec<T>::size()];
  x.store(lanes);
  for (int64_t half = Vec<T>::size() / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) {
      lanes[j] += lanes[j + half];
    }
  }
  return lanes[0];
}

// The larger of the two, `x` where it is NaN.
template <typename T>
inline Vec<T> at_least(const Vec<T>& bound, const Vec<T>& x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_max_ps(bound, x);
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>) {
    return _mm256_max_ps(bound, x);
  }
#endif
  return at::vec::maximum(bound, x);
}

// The smaller of the two, `x` where it is NaN.
template <typename T>
inline Vec<T> at_most(const Vec<T>& bound, const Vec<T>& x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_min_ps(bound, x);
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>) {
    return _mm256_min_ps(bound, x);
  }
#endif
  return at::vec::minimum(bound, x);
}

// p 2^n for whole n in [-200, 128].
inline Vec<float> times_power(const Vec<float>& p, const Vec<float>& n) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_scalef_ps(p, n);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
  const __m256i one = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i other = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return _mm256_mul_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(one)), _mm256_castsi256_ps(other));
#else
  alignas(64) float lanes[Vec<float>::size()], powers[Vec<float>::size()];
  p.store(lanes);
  n.store(powers);
  for (int64_t j = 0; j < Vec<float>::size(); ++j) {
    lanes[j] = lanes[j] != lanes[j] ? lanes[j] : std::ldexp(lanes[j], static_cast<int>(powers[j]));
  }
  return Vec<float>::loadu(lanes);
#endif
}

// 2^f for |f| <= 1/2, within 8e-8 of itself: interpolated at the Chebyshev nodes, coefficients rounded to float32.
inline Vec<float> power_of_fraction(const Vec<float>& f) {
  Vec<float> p = at::vec::fmadd(Vec<float>(1.5461444854736328e-4f), f, Vec<float>(1.3400427997112274e-3f));
  p = at::vec::fmadd(p, f, Vec<float>(9.618056938052177e-3f));
  p = at::vec::fmadd(p, f, Vec<float>(5.550327152013779e-2f));
  p = at::vec::fmadd(p, f, Vec<float>(2.4022650718688965e-1f));
  p = at::vec::fmadd(p, f, Vec<float>(6.931471824645996e-1f));
  return at::vec::fmadd(p, f, Vec<float>(1.f));
}

// 2^x for x < 128; 0 at -infinity.
inline Vec<float> power(const Vec<float>& x) {
  const Vec<float> inside = at_least(Vec<float>(-200.f), x), n = inside.round();
  return times_power(power_of_fraction(inside - n), n);
}
inline Vec<double> power(const Vec<double>& x) {
  return x.exp2();
}

// a b + c, rounded once. Where at::vec would round twice for want of an instruction, the lanes go through wider arithmetic.
template <typename T>
inline Vec<T> fused(const Vec<T>& a, const Vec<T>& b, const Vec<T>& c) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2) || defined(__aarch64__)
  return at::vec::fmadd(a, b, c);
#else
  alignas(64) T x[Vec<T>::size()], y[Vec<T>::size()], z[Vec<T>::size()];
  a.store(x);
  b.store(y);
  c.store(z);
  for (int64_t j = 0; j < Vec<T>::size(); ++j) {
    if constexpr (std::is_same_v<T, float>) {
      z[j] = static_cast<float>(static_cast<double>(x[j]) * y[j] + z[j]);
    } else {
      z[j] = std::fma(x[j], y[j], z[j]);
    }
  }
  return Vec<T>::loadu(z);
#endif
}

// a + b as a rounded sum and what rounding lost.
template <typename T>
struct TwoSum {
  TwoSum(const Vec<T>& a, const Vec<T>& b) : sum(a + b) {
    const Vec<T> seen = sum - a;
    lost = (a - (sum - seen)) + (b - seen);
  }
  Vec<T> sum, lost;
};

// log2(e) / epsilon in two numbers of T: one float alone is off by 3e-8, which scores of 100 turn into 1e-4 of a code.
template <typename T>
struct Factor {
  explicit Factor(double epsilon) {
    const long double factor = 1.442695040888963407359924681001892137L / epsilon;
    const T near = static_cast<T>(factor);
    high = Vec<T>(near);
    low = Vec<T>(static_cast<T>(factor - near));
    floor = Vec<T>(static_cast<T>(-200 / factor));
  }
  // x log2(e) / epsilon + bias, rounded to the size of the result alone: a bias may be as large as the logit it cancels.
  // The floor keeps a score of -infinity from meeting a negative `low`: infinity - infinity.
  Vec<T> logits(const Vec<T>& x, const Vec<T>& bias) const {
    const Vec<T> finite = at_least(Vec<T>(std::numeric_limits<T>::lowest()), x);
    return fused(finite, low, fused(finite, high, bias));
  }
  // (x - top) log2(e) / epsilon, exactly 0 at the top.
  Vec<T> below(const Vec<T>& x, const Vec<T>& top) const {
    const Vec<T> distance = x - top;
    return fused(distance, low, distance * high);
  }
  // 2^(x log2(e) / epsilon) for exponents below 128; that of a large one is not rounded to its own size.
  Vec<T> powers(const Vec<T>& x) const {
    if constexpr (std::is_same_v<T, float>) {
      const Vec<T> finite = at_least(floor, x);
      const Vec<T> n = (finite * high).round();
      return times_power(power_of_fraction(fused(finite, low, fused(finite, high, n.neg()))), n);
    } else {
      return power(logits(x, Vec<T>(T(0))));
    }
  }
  Vec<T> high, low, floor;
};

constexpr double kNats = 1 / kPowersPerNat;

// The largest score of a row; a NaN may go unnoticed here, not in what is computed with it.
template <typename scalar_t>
inline Acc<scalar_t> row_top(const scalar_t* x, int64_t k) {
  using T = Acc<scalar_t>;
  Vec<T> top(-kInfinity<T>);
  over_row(x, k, -kInfinity<T>, [&](int64_t, const Vec<T>& scores) { top = at_least(top, scores); });
  return widest(top);
}

// The sum of a row, in T until it is closed, then in float64.
template <typename T>
struct Sum {
  void close() {
    whole += total(part);
    part = Vec<T>(T(0));
  }
  Vec<T> part = Vec<T>(T(0));
  double whole = 0;
};

// x * y in the first `left` lanes, 0 in the others, whatever they hold.
template <typename T>
inline Vec<T> masked_product(const T* x, const Vec<T>& y, int64_t left) {
  alignas(64) T lanes[Vec<T>::size()];
  y.store(lanes);
  for (int64_t j = 0; j < Vec<T>::size(); ++j) {
    lanes[j] = j < left ? lanes[j] * x[j] : T(0);
  }
  return Vec<T>::loadu(lanes);
}

// Puts `count` values of an output row where they belong, rounded to its type; past the caches where `stream` says so.
inline void put_bytes(void* out, const void* from, size_t bytes, bool stream) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if (stream && bytes >= 256) {
    char* to = static_cast<char*>(out);
    const char* source = static_cast<const char*>(from);
    const size_t head = (64 - reinterpret_cast<uintptr_t>(to) % 64) % 64, body = (bytes - head) / 64 * 64;
    std::memcpy(to, source, head);
    for (size_t b = head; b < head + body; b += 64) {
#if defined(CPU_CAPABILITY_AVX512)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + b), _mm512_loadu_si512(source + b));
#else
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + b), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + b)));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + b + 32), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + b + 32)));
#endif
    }
    std::memcpy(to + head + body, source + head + body, bytes - head - body);
    return;
  }
#endif
  std::memcpy(out, from, bytes);
}

inline void fence_streams() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

// out[0 : count] <- values, count <= kChunk; `values` is readable up to the next multiple of two vectors.
template <typename scalar_t>
inline void put(scalar_t* out, const Acc<scalar_t>* values, int64_t count, bool stream) {
  if constexpr (std::is_same_v<scalar_t, Acc<scalar_t>>) {
    put_bytes(out, values, count * sizeof(scalar_t), stream);
  } else {
    alignas(64) scalar_t rounded[kChunk + 2 * kLanes];
    for (int64_t j = 0; j < count; j += 2 * Vec<float>::size()) {
      const Vec<float> one = Vec<float>::loadu(values + j), other = Vec<float>::loadu(values + j + Vec<float>::size());
      at::vec::convert_from_float<scalar_t>(one, other).store(rounded + j);
    }
    put_bytes(out, rounded, count * sizeof(scalar_t), stream);
  }
}

// out <- x[0 : count] as T, filled up to whole vectors.
template <typename T, typename scalar_t>
inline void widen_as(const scalar_t* x, int64_t count, T fill, T* out) {
  int64_t j = 0;
  if constexpr (std::is_same_v<Acc<scalar_t>, T>) {
    for (; j + Vec<T>::size() <= count; j += Vec<T>::size()) {
      read(x + j).store(out + j);
    }
  }
  for (; j < count; ++j) {
    out[j] = static_cast<T>(x[j]);
  }
  for (; j % kLanes != 0; ++j) {
    out[j] = fill;
  }
}

// body(pointer of the row's own type)
template <typename Body>
inline auto with_type(const AnyRow& row, const Body& body) {
  switch (row.type) {
    case ScoreType::f32:
      return body(static_cast<const float*>(row.data));
    case ScoreType::bf16:
      return body(static_cast<const at::BFloat16*>(row.data));
    case ScoreType::f16:
      return body(static_cast<const at::Half*>(row.data));
    default:
      return body(static_cast<const double*>(row.data));
  }
}

template <typename T>
inline void widen(const AnyRow& row, int64_t begin, int64_t count, T fill, T* out) {
  with_type(row, [=](const auto* x) { widen_as(x + begin, count, fill, out); });
}

// sweep<scalar_t>(...) for the types of scores whose arithmetic is float32.
#define FUSEER_OF_FLOAT(type, sweep, ...)    \
  switch (type) {                            \
    case ScoreType::bf16:                    \
      return sweep<at::BFloat16>(__VA_ARGS__); \
    case ScoreType::f16:                     \
      return sweep<at::Half>(__VA_ARGS__);   \
    default:                                 \
      return sweep<float>(__VA_ARGS__);      \
  }

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace fuseer
