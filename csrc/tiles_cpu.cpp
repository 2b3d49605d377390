// How are tiles of similarities made on the CPU: which matrix product, on which numbers?
#include "tiles_cpu.h"

#include <ATen/Dispatch.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cmath>

namespace fuseer {

void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride,
              bool add) {
  for (int64_t d = 0; d < k; d += kSummed) {
    at::native::cpublas::brgemm(m, n, std::min(kSummed, k - d), a_stride, b_stride, c_stride, add || d > 0, a + d, b + d * b_stride, c);
  }
}

void multiply(int64_t m, int64_t n, int64_t k, const double* a, int64_t a_stride, const double* b, int64_t b_stride, double* c,
              int64_t c_stride, bool add) {
  const auto matrix = [](const double* x, int64_t rows, int64_t columns, int64_t stride) {
    return at::from_blob(const_cast<double*>(x), {rows, columns}, {stride, 1}, at::kDouble);
  };
  at::Tensor out = matrix(c, m, n, c_stride);
  if (add) {
    at::addmm_out(out, out, matrix(a, m, k, a_stride), matrix(b, k, n, b_stride));
  } else {
    at::mm_out(out, matrix(a, m, k, a_stride), matrix(b, k, n, b_stride));
  }
}

void multiply(int64_t m, int64_t n, int64_t k, const c10::BFloat16* a, int64_t a_stride, const c10::BFloat16* b, int64_t b_stride, float* c,
              int64_t c_stride, bool add) {
  for (int64_t d = 0; d < k; d += kSummed) {
    at::native::cpublas::brgemm(m, n, std::min(kSummed, k - d), a_stride, b_stride, c_stride, add || d > 0, a + d, b + d * b_stride, c);
  }
}

bool multiplies_bfloat16() {
  static const bool found = [] {
    constexpr int64_t side = 32;
    std::vector<c10::BFloat16> a(side * side), b(side * side), pairs(side * side);
    std::vector<float> c(side * side);
    for (int64_t i = 0; i < side * side; ++i) {
      a[i] = static_cast<float>(i % 7 - 3);
      b[i] = static_cast<float>(i % 5 - 2);
    }
    interleave(b.data(), side, side, side, pairs.data());
    try {
      multiply(side, side, side, a.data(), side, pairs.data(), side, c.data(), side, false);
    } catch (const c10::Error&) {
      return false;
    }
    for (int64_t i = 0; i < side; ++i) {
      for (int64_t j = 0; j < side; ++j) {
        float sum = 0;
        for (int64_t d = 0; d < side; ++d) {
          sum += static_cast<float>(a[i * side + d]) * static_cast<float>(b[d * side + j]);
        }
        if (sum != c[i * side + j]) {
          return false;
        }
      }
    }
    return true;
  }();
  return found;
}

void interleave(const c10::BFloat16* x, int64_t stride, int64_t rows, int64_t columns, c10::BFloat16* out) {
  for (int64_t i = 0; i < rows; i += 2) {
    const c10::BFloat16* next = x + (i + 1) * stride;
    for (int64_t j = 0; j < columns; ++j) {
      out[i * columns + 2 * j] = x[i * stride + j];
      out[i * columns + 2 * j + 1] = i + 1 < rows ? next[j] : c10::BFloat16(0.f);
    }
  }
}

double dot(const double* x, const double* y, int64_t n) {
  double sums[8] = {};
  const int64_t whole = n / 8 * 8;
  for (int64_t d = 0; d < whole; d += 8) {
    for (int64_t lane = 0; lane < 8; ++lane) {
      sums[lane] += x[d + lane] * y[d + lane];
    }
  }
  for (int64_t d = whole; d < n; ++d) {
    sums[0] += x[d] * y[d];
  }
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

double dot(const at::Tensor& x, int64_t i, const at::Tensor& y, int64_t j) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "dot", [&] {
    const scalar_t *a = x.const_data_ptr<scalar_t>() + i * x.stride(0), *b = y.const_data_ptr<scalar_t>() + j * y.stride(0);
    const int64_t n = x.size(1);
    constexpr int64_t piece = 256;
    double wide[2][piece], sum = 0;
    for (int64_t d = 0; d < n; d += piece) {
      const int64_t count = std::min(piece, n - d);
      std::copy_n(a + d, count, wide[0]);
      std::copy_n(b + d, count, wide[1]);
      sum += dot(wide[0], wide[1], count);
    }
    return sum;
  });
}

std::vector<double> inverse_norms(const at::Tensor& rows, bool normalize) {
  std::vector<double> inverses(rows.size(0), 1.0);
  if (normalize) {
    at::parallel_for(0, rows.size(0), 1 + 32768 / std::max<int64_t>(1, rows.size(1)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        inverses[i] = 1 / std::max(std::sqrt(dot(rows, i, rows, i)), kLeastNorm);
      }
    });
  }
  return inverses;
}

bool can_be_scaled_later(const std::vector<double>& inverses) {
  return std::all_of(inverses.begin(), inverses.end(), [](double inverse) { return inverse > 1e-5 && inverse < 1e5; });
}

bool cosines_need_no_maximum(double temperature) {
  return 2 / std::abs(temperature) < 85;
}

ReleasedProducts::~ReleasedProducts() {
  at::native::cpublas::brgemm_release();
}

double excess(double s, double a) {
  return a > -700 ? std::log1p(s * std::exp(-a)) : std::log(s) - a;
}

void through_normalisation(const std::vector<double>& z, double inverse, std::vector<double>& d) {
  const bool clamped = inverse >= 1 / kLeastNorm;
  const double along = clamped ? 0 : dot(z.data(), d.data(), static_cast<int64_t>(d.size()));
  for (size_t i = 0; i < d.size(); ++i) {
    d[i] = inverse * (d[i] - z[i] * along);
  }
}

}  // namespace fuseer
