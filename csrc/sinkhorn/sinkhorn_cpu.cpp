// How does fuseer::sinkhorn run on the CPU? The row-softmax dual form of kernels/sinkhorn/reference.py, threads over fixed runs of rows.
#include "../library.h"
#include "sinkhorn_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/full.h>
#include <ATen/ops/log.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/sub.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

namespace fuseer {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

const SinkhornKernels& kernels() {
#ifdef FUSEER_X86_SIMD
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") {
    return AVX512::sinkhorn_kernels;
  }
  if (capability == "AVX2") {
    return AVX2::sinkhorn_kernels;
  }
#endif
  return DEFAULT::sinkhorn_kernels;
}

ScoreType score_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return ScoreType::f32;
    case at::kBFloat16:
      return ScoreType::bf16;
    case at::kHalf:
      return ScoreType::f16;
    default:
      TORCH_CHECK_TYPE(false, "sinkhorn: scores must be float16, bfloat16 or float32 for backend cpu; got ", type);
  }
}

// The rows of every problem, cut into runs that depend on the shape alone: sums are added in one order at any thread count.
class Problem {
 public:
  Problem(const at::Tensor& scores, double epsilon)
      : scores_(scores), type_(score_type(scores.scalar_type())), epsilon_(epsilon), n_(scores.size(-2)), k_(scores.size(-1)) {
    count_ = 1;
    for (int64_t d = 0; d + 2 < scores.dim(); ++d) {
      count_ *= scores.size(d);
    }
    runs_ = std::max<int64_t>(1, std::min(kMaxRuns, (n_ + kRunRows - 1) / kRunRows));
  }
  int64_t count() const { return count_; }
  int64_t k() const { return k_; }
  int64_t runs() const { return runs_; }
  int64_t begin(int64_t run) const { return n_ * run / runs_; }
  int64_t offset(int64_t problem, int64_t row) const { return (problem * n_ + row) * k_; }
  Rows rows(int64_t problem, int64_t begin, int64_t end) const {
    const char* data = static_cast<const char*>(scores_.const_data_ptr()) + offset(problem, begin) * scores_.element_size();
    return {data, type_, end - begin, k_, epsilon_};
  }
  template <typename Body>
  void for_each_run(const Body& body) const {
    const int64_t grain = 1 + kThreadElements / (kRunRows * k_);
    at::parallel_for(0, count_ * runs_, grain, [&](int64_t first, int64_t last) {
      std::vector<float> row(padded(k_));
      for (int64_t task = first; task < last; ++task) {
        body(task, task / runs_, task % runs_, row.data());
      }
    });
  }
  template <typename Body>
  void for_each_column_block(const Body& body) const {
    const int64_t blocks = (k_ + kColumns - 1) / kColumns;
    at::parallel_for(0, count_ * blocks, 8, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t begin = task % blocks * kColumns;
        body(task / blocks, begin, std::min(begin + kColumns, k_));
      }
    });
  }
  // [problems, k] laid out as [problems, padded(k)], `fill` beyond k.
  std::vector<float> padded_rows(const at::Tensor& per_column, float fill) const {
    std::vector<float> rows(count_ * padded(k_), fill);
    for (int64_t p = 0; p < count_; ++p) {
      std::copy_n(per_column.const_data_ptr<float>() + p * k_, k_, &rows[p * padded(k_)]);
    }
    return rows;
  }

 private:
  static constexpr int64_t kRunRows = 16, kMaxRuns = 64, kColumns = 1024;
  static constexpr int64_t kThreadElements = 16384;  // fewer are done before a second thread has woken
  const at::Tensor& scores_;
  ScoreType type_;
  double epsilon_;
  int64_t n_, k_, count_, runs_;
};

// out[p, k] = the maximum over the rows of problem p.
at::Tensor column_max(const Problem& problem, at::IntArrayRef sizes) {
  const int64_t width = padded(problem.k());
  std::vector<float> partial(problem.count() * problem.runs() * width, kMinusInfinity);
  problem.for_each_run([&](int64_t task, int64_t p, int64_t run, float*) {
    kernels().column_max(problem.rows(p, problem.begin(run), problem.begin(run + 1)), &partial[task * width]);
  });
  at::Tensor out = at::full(sizes, kMinusInfinity, at::kFloat);
  float* top = out.mutable_data_ptr<float>();
  problem.for_each_column_block([&](int64_t p, int64_t first, int64_t last) {
    for (int64_t run = 0; run < problem.runs(); ++run) {
      const float* x = &partial[(p * problem.runs() + run) * width];
      for (int64_t j = first; j < last; ++j) {
        float& column = top[p * problem.k() + j];
        column = x[j] > column || std::isnan(x[j]) ? x[j] : column;
      }
    }
  });
  return out;
}

// out[p, k] = the sum over the rows of problem p of what sweep(task, p, first row, last row, row buffer, sums) adds per column.
template <typename Sweep>
at::Tensor column_sums(const Problem& problem, at::IntArrayRef sizes, const Sweep& sweep) {
  constexpr int64_t kBlock = 32;  // rows summed in float32 before they join a float64 sum
  const int64_t k = problem.k();
  std::vector<double> partial(problem.count() * problem.runs() * k);
  problem.for_each_run([&](int64_t task, int64_t p, int64_t run, float* row) {
    std::vector<float> sums(padded(k));
    for (int64_t begin = problem.begin(run); begin < problem.begin(run + 1); begin += kBlock) {
      std::fill(sums.begin(), sums.end(), 0.f);
      sweep(task, p, begin, std::min(begin + kBlock, problem.begin(run + 1)), row, sums.data());
      double* total = &partial[task * k];
      for (int64_t j = 0; j < k; ++j) {
        total[j] += sums[j];
      }
    }
  });
  at::Tensor out = at::empty(sizes, at::kFloat);
  float* sum = out.mutable_data_ptr<float>();
  problem.for_each_column_block([&](int64_t p, int64_t first, int64_t last) {
    double* total = &partial[p * problem.runs() * k];
    for (int64_t run = 1; run < problem.runs(); ++run) {
      for (int64_t j = first; j < last; ++j) {
        total[j] += total[run * k + j];
      }
    }
    for (int64_t j = first; j < last; ++j) {
      sum[p * k + j] = static_cast<float>(total[j]);
    }
  });
  return out;
}

// Which problems may multiply stored exponentials by w = exp(v + top) instead of taking every exponential anew.
// With all exponents and all log w within 40, no product leaves float32: exp(-80) > 2^-126. Cosines at epsilon 0.05 always are.
class Scaled {
 public:
  Scaled(const Problem& problem, const at::Tensor& top, std::vector<float> least) : problem_(problem), top_(top), least_(std::move(least)) {}
  void update(const at::Tensor& potentials) {
    const at::Tensor log_w = potentials.add(top_);
    w_ = problem_.padded_rows(log_w.exp(), 0.f);
    v_ = problem_.padded_rows(potentials, kMinusInfinity);
    possible_.assign(problem_.count(), true);
    const float* x = log_w.const_data_ptr<float>();
    for (int64_t i = 0; i < log_w.numel(); ++i) {
      if (!(std::abs(x[i]) <= kLimit && least_[i / problem_.k()] >= -kLimit)) {
        possible_[i / problem_.k()] = false;
      }
    }
  }
  bool possible(int64_t p) const { return possible_[p]; }
  const float* w(int64_t p) const { return &w_[p * padded(problem_.k())]; }
  const float* v(int64_t p) const { return &v_[p * padded(problem_.k())]; }

 private:
  static constexpr float kLimit = 40.f;
  const Problem& problem_;
  const at::Tensor& top_;
  std::vector<float> least_, w_, v_;
  std::vector<bool> possible_;
};

}  // namespace

at::Tensor sinkhorn_cpu(const at::Tensor& scores_any, double epsilon, int64_t iterations, const std::string& group_name) {
  const at::Tensor scores = scores_any.contiguous();
  const Problem problem(scores, epsilon);
  std::vector<int64_t> sizes(scores.sizes().begin(), scores.sizes().end() - 2);
  sizes.push_back(problem.k());
  at::Tensor codes = at::empty(scores.sizes(), at::kFloat);
  float* e = codes.mutable_data_ptr<float>();  // the exponentials of the first step, until the codes replace them

  const at::Tensor top = all_reduce(column_max(problem, sizes), "max", group_name);
  const std::vector<float> tops = problem.padded_rows(top, kMinusInfinity);
  std::vector<float> least_of_run(problem.count() * problem.runs(), std::numeric_limits<float>::infinity());
  at::Tensor sums = column_sums(problem, sizes, [&](int64_t task, int64_t p, int64_t begin, int64_t end, float*, float* out) {
    float& least = least_of_run[task];
    const float* top_p = &tops[p * padded(problem.k())];
    const float found = kernels().column_exp_sums(problem.rows(p, begin, end), top_p, e + problem.offset(p, begin), out);
    least = found < least || std::isnan(found) ? found : least;
  });
  std::vector<float> least(problem.count(), std::numeric_limits<float>::infinity());
  for (size_t task = 0; task < least_of_run.size(); ++task) {
    float& of_problem = least[task / problem.runs()];
    of_problem = least_of_run[task] < of_problem || std::isnan(least_of_run[task]) ? least_of_run[task] : of_problem;
  }
  Scaled scaled(problem, top, std::move(least));

  at::Tensor potentials = top.add(all_reduce(sums, "sum", group_name).log()).neg();
  for (int64_t step = 1; step < iterations; ++step) {
    scaled.update(potentials);
    sums = column_sums(problem, sizes, [&](int64_t, int64_t p, int64_t begin, int64_t end, float* row, float* out) {
      if (scaled.possible(p)) {
        kernels().column_scaled_sums(e + problem.offset(p, begin), end - begin, problem.k(), scaled.w(p), row, out);
      } else {
        kernels().column_softmax_sums(problem.rows(p, begin, end), scaled.v(p), row, out);
      }
    });
    potentials = potentials.sub(all_reduce(sums, "sum", group_name).log());
  }

  scaled.update(potentials);
  problem.for_each_run([&](int64_t, int64_t p, int64_t run, float* row) {
    const int64_t begin = problem.begin(run), end = problem.begin(run + 1);
    if (scaled.possible(p)) {
      kernels().scale_rows(e + problem.offset(p, begin), end - begin, problem.k(), scaled.w(p), row);
    } else {
      kernels().row_softmax(problem.rows(p, begin, end), scaled.v(p), row, e + problem.offset(p, begin));
    }
  });
  return codes;
}

}  // namespace fuseer
