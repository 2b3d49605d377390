// How do fuseer::soft_xent and its gradient run on the CPU? Row by row, each thread its own run of rows.
#include "soft_xent_cpu.h"

#include "../library.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

namespace fuseer {
namespace {

template <typename T>
const SoftXentKernels<T>& kernels() {
  return of_type<T>(FUSEER_CHOSEN_KERNELS(soft_xent_kernels));
}

// A matrix whose rows are in one piece, by pointer.
struct Matrix {
  explicit Matrix(const at::Tensor& x)
      : tensor(rows_in_one_piece(x)),
        data(static_cast<const char*>(tensor.const_data_ptr())),
        type(score_type(tensor, "soft_xent")),
        stride(tensor.stride(0) * tensor.element_size()) {}
  AnyRow row(int64_t n) const { return {data + n * stride, type}; }
  at::Tensor tensor;
  const char* data;
  ScoreType type;
  int64_t stride;
};

// One row's options, the weights and the center in the type of the arithmetic.
template <typename T>
struct Options {
  Options(const at::Tensor& logits, const std::optional<at::Tensor>& weights, const std::optional<at::Tensor>& target_center,
          std::optional<double> target_temperature)
      : k(logits.size(1)), center(padded(k), T(0)), sharpening{target_temperature.value_or(0), center.data()} {
    const at::ScalarType type = c10::CppTypeToScalarType<T>::value;
    if (weights.has_value()) {
      weight = weights->to(type).contiguous();
    }
    if (target_center.has_value()) {
      const at::Tensor shift = target_center->to(type).contiguous();
      std::copy_n(shift.const_data_ptr<T>(), k, center.data());
    }
    std::fill(center.begin() + k, center.end(), -kAbsent<T>);
  }
  double weight_of(int64_t n) const { return weight.defined() ? weight.const_data_ptr<T>()[n] : 1.0; }
  int64_t grain() const { return 1 + kThreadScores / k; }
  int64_t k;
  std::vector<T> center;
  Sharpening<T> sharpening;
  at::Tensor weight;
};

template <typename T>
std::tuple<at::Tensor, at::Tensor> forward(const Matrix& logits, const Matrix& target, double temperature, const Options<T>& options) {
  const int64_t rows = logits.tensor.size(0);
  const at::ScalarType type = c10::CppTypeToScalarType<T>::value;
  at::Tensor loss = at::empty({rows}, type), statistics = at::empty({rows, 4}, type);
  T* losses = loss.mutable_data_ptr<T>();
  auto* of_row = reinterpret_cast<XentStatistics<T>*>(statistics.mutable_data_ptr<T>());
  at::parallel_for(0, rows, options.grain(), [&](int64_t begin, int64_t end) {
    std::unique_ptr<T[]> row(new T[padded(options.k)]);
    for (int64_t n = begin; n < end; ++n) {
      const double charged =
          kernels<T>().forward(logits.row(n), target.row(n), options.k, temperature, options.sharpening, row.get(), &of_row[n]);
      losses[n] = static_cast<T>(options.weight_of(n) * charged);
    }
  });
  return {loss, statistics};
}

template <typename T>
at::Tensor backward(const at::Tensor& dloss, const Matrix& logits, const Matrix& target, const at::Tensor& statistics, double temperature,
                    const Options<T>& options) {
  const int64_t rows = logits.tensor.size(0);
  at::Tensor dlogits = result(logits.tensor.sizes(), logits.tensor.scalar_type());
  char* out = static_cast<char*>(dlogits.mutable_data_ptr());
  const bool stream = static_cast<int64_t>(dlogits.nbytes()) > kStreamedBytes;
  const at::Tensor incoming = dloss.contiguous();
  const auto* of_row = reinterpret_cast<const XentStatistics<T>*>(statistics.const_data_ptr<T>());
  at::parallel_for(0, rows, options.grain(), [&](int64_t begin, int64_t end) {
    std::unique_ptr<T[]> row(new T[padded(options.k)]);
    for (int64_t n = begin; n < end; ++n) {
      const double factor = options.weight_of(n) * incoming.const_data_ptr<T>()[n] / temperature;
      kernels<T>().backward(logits.row(n), target.row(n), options.k, temperature, options.sharpening, of_row[n], factor, stream, row.get(),
                            out + n * options.k * dlogits.element_size());
    }
  });
  return dlogits;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> soft_xent_cpu(const at::Tensor& logits, const at::Tensor& target, double temperature,
                                                 const std::optional<at::Tensor>& weights, const std::optional<at::Tensor>& target_center,
                                                 std::optional<double> target_temperature) {
  const Matrix x(logits), q(target);
  if (x.type == ScoreType::f64) {
    return forward(x, q, temperature, Options<double>(logits, weights, target_center, target_temperature));
  }
  return forward(x, q, temperature, Options<float>(logits, weights, target_center, target_temperature));
}

at::Tensor soft_xent_backward_cpu(const at::Tensor& dloss, const at::Tensor& logits, const at::Tensor& target, const at::Tensor& statistics,
                                  double temperature, const std::optional<at::Tensor>& weights, const std::optional<at::Tensor>& target_center,
                                  std::optional<double> target_temperature) {
  const Matrix x(logits), q(target);
  const at::Tensor kept = statistics.contiguous();
  if (x.type == ScoreType::f64) {
    return backward(dloss, x, q, kept, temperature, Options<double>(logits, weights, target_center, target_temperature));
  }
  return backward(dloss, x, q, kept, temperature, Options<float>(logits, weights, target_center, target_temperature));
}

}  // namespace fuseer
