// How do Sinkhorn's column potentials come about on the CPU, for every op that needs them?
#pragma once

#include "instruction_set.h"
#include "library.h"
#include "rows.h"

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

namespace fuseer {

// Base-2 potentials as high + low, and w = 2^v; kAbsent and 0 beyond k. One T alone would round a potential of 2,000 by 1e-4.
template <typename T>
struct Columns {
  const T* high;
  const T* low;
  const T* w;
};

// What one thread does with a block of rows, for one instruction set. Exponents are base 2: logits are x log2(e) / epsilon.
// Columns hold padded(k) numbers. `range` is the smallest and largest score seen.
template <typename T>
struct PotentialsKernels {
  // sums_k <- sums_k + 2^logit_ik, kept in `cache` [count, k] where that is given
  void (*first)(const Rows&, double epsilon, T* cache, T* sums, T* range);
  // top_k <- max(top_k, x_ik)
  void (*column_max)(const Rows&, T* top);
  // sums_k <- sums_k + 2^(logit_ik + high_k + low_k)
  void (*shifted)(const Rows&, double epsilon, const Columns<T>& shift, T* sums);
  // sums_k <- sums_k + e_ik / sum_j e_ij w_j
  void (*cached)(const T* cache, int64_t count, int64_t k, const T* w, T* sums);
  // sums_k <- sums_k + softmax_2(logit_i + v)_k; `safe`: no exponential leaves the range without the row's maximum
  void (*sweep)(const Rows&, double epsilon, const Columns<T>& v, bool safe, T* row, T* sums);
  // codes_ik <- e_ik w_k / sum_j e_ij w_j, in place
  void (*scale)(T* cache, int64_t count, int64_t k, const T* w, bool stream);
  // codes_ik <- softmax_2(logit_i + v)_k
  void (*codes)(const Rows&, double epsilon, const Columns<T>& v, bool safe, T* row, T* codes, bool stream);
  // total_k <- total_k + sums_k, sums_k <- 0
  void (*flush)(T* sums, int64_t k, double* total);
  // sums_j <- sum over slots of partial[slot, j] (times w_j where that is given), for `begin` <= j < `end`
  void (*combine)(const T* partial, int64_t slots, int64_t stride, const T* w, int64_t begin, int64_t end, T* sums);
  // v_j <- v_j - log2 sums_j and w_j <- w_j / sums_j; returns the largest |v_j|
  T (*update)(const T* sums, int64_t begin, int64_t end, T* high, T* low, T* w);
};

struct PotentialsKernelSet {
  PotentialsKernels<float> of_float;
  PotentialsKernels<double> of_double;
};

FUSEER_DECLARE_KERNELS(PotentialsKernelSet, potentials_kernels)

// Rows of one problem that lie one stride apart: its own batch, or a queue.
struct Segment {
  const char* data;
  int64_t rows;
  int64_t stride;
};

// The rows of every problem, dealt out evenly to the threads, and the potentials of their columns.
template <typename T>
class Potentials {
 public:
  // segments[p] are the rows of problem p, in order; `cache`, if any, takes an exponential for every score, [rows, k] in that order.
  Potentials(const std::vector<std::vector<Segment>>& segments, ScoreType type, int64_t k, double epsilon, T* cache);
  // One MAX, then `iterations` SUM all-reduces of [problems, k]; `passengers` ride in the first SUM and come back summed.
  void iterate(int64_t iterations, const std::string& group_name, std::vector<double>& passengers);
  Columns<T> columns(int64_t problem) const {
    const int64_t at = problem * padded(k_);
    return {&high_[at], &low_[at], &w_[at]};
  }
  // codes [rows, k] of all problems, in the order of the segments; `codes` may be the cache.
  void write_codes(T* codes) const;
  // The potentials in nats, [problems, k], float64: what they would lose as one float32, a gradient would see.
  at::Tensor in_nats() const;

 private:
  // A thread's rows of one segment; `slot` is where it leaves the column sums of all its rows of that problem.
  struct Piece {
    Rows rows;
    int64_t problem, row, slot;
  };
  bool cached(int64_t problem) const { return cache_ != nullptr && safe_[problem]; }
  T* partial(int64_t slot) const { return partial_.get() + slot * padded(k_); }
  template <typename Body>
  void for_each_block(int64_t thread, const Body& body) const;
  template <typename Body>
  void column_sums(const std::vector<char>& skip, const Body& body);
  template <typename Body>
  void for_each_column_block(const Body& body) const;
  void first_step(const std::string& group_name, std::vector<double>& passengers);
  void shift_columns(const std::string& group_name);
  void shift_sums();
  void next_step(const std::string& group_name);
  void combine(int64_t problem, int64_t begin, int64_t end, T* sums) const;
  void finish(const std::string& group_name, std::vector<double>* passengers);

  std::vector<std::vector<Piece>> threads_;
  std::vector<int64_t> slots_;  // the first slot of every problem, and the end
  int64_t problems_, k_, rows_ = 0;
  double epsilon_;
  T* cache_;
  std::unique_ptr<T[]> partial_;  // [slots, padded(k)]
  std::vector<T> high_, low_, w_; // [problems, padded(k)]
  // Of every problem: all logits of this process are small; the potentials as well, so that no exponential leaves the range.
  std::vector<char> in_range_, safe_;
  int64_t sweeps_ = 0;
};

}  // namespace fuseer
