// How does fuseer::sinkhorn run on the CPU? Column potentials (../potentials_cpu.h), then codes in the place of the stored exponentials.
#include "../potentials_cpu.h"

#include <ATen/core/Tensor.h>

namespace fuseer {
namespace {

template <typename T>
void write_codes(const at::Tensor& scores, ScoreType type, double epsilon, int64_t iterations, const std::string& group_name, T* codes) {
  const int64_t n = scores.size(-2), k = scores.size(-1), row = k * scores.element_size();
  int64_t problems = 1;
  for (int64_t d = 0; d + 2 < scores.dim(); ++d) {
    problems *= scores.size(d);
  }
  std::vector<std::vector<Segment>> segments;
  for (int64_t p = 0; p < problems; ++p) {
    segments.push_back({{static_cast<const char*>(scores.const_data_ptr()) + p * n * row, n, row}});
  }
  Potentials<T> potentials(segments, type, k, epsilon, codes);
  std::vector<double> passengers;
  potentials.iterate(iterations, group_name, passengers);
  potentials.write_codes(codes);
}

}  // namespace

at::Tensor sinkhorn_cpu(const at::Tensor& scores_any, double epsilon, int64_t iterations, const std::string& group_name) {
  const at::Tensor scores = scores_any.contiguous();
  const ScoreType type = score_type(scores, "sinkhorn");
  at::Tensor codes = result(scores.sizes(), type == ScoreType::f64 ? at::kDouble : at::kFloat);
  if (type == ScoreType::f64) {
    write_codes(scores, type, epsilon, iterations, group_name, codes.mutable_data_ptr<double>());
  } else {
    write_codes(scores, type, epsilon, iterations, group_name, codes.mutable_data_ptr<float>());
  }
  return codes;
}

}  // namespace fuseer
