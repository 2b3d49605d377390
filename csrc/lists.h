// How do the tensors at one place of several lists lie in memory, and which thread walks which of their elements?
#pragma once

#include "rows.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace fuseer {

// Three lists (`other` may be empty) as flat memory. Tensors of one place that lie alike and without gaps are walked as they lie; for
// the others copies stand in, and write_back() carries what was written to copies of `target` and `other` to the tensors themselves.
class Places {
 public:
  Places(const char* op, at::TensorList target, at::TensorList source, at::TensorList other);
  void write_back() const;
  std::vector<Place> all;

 private:
  at::Tensor laid_out(const at::Tensor& x, const at::Tensor& like, bool written);
  std::vector<at::Tensor> held_;
  std::vector<std::pair<at::Tensor, at::Tensor>> written_;
};

// A run of elements that one thread walks begins at a multiple of so many elements of its place.
constexpr int64_t kRun = 8192;

// Calls body(number of the place, begin, end) until all elements were walked, every thread as many as any other but for kRun.
template <typename Body>
void over_places(const Place* places, int64_t count, const Body& body) {
  std::vector<int64_t> ends(count);
  int64_t total = 0;
  for (int64_t k = 0; k < count; ++k) {
    ends[k] = total += places[k].numel;
  }
  const auto run_of = [&](int64_t element) -> std::pair<int64_t, int64_t> {
    const int64_t k = std::upper_bound(ends.begin(), ends.end(), element) - ends.begin();
    return {k, k < count ? (element - ends[k] + places[k].numel) / kRun * kRun : 0};
  };
  at::parallel_for(0, total, kThreadScores, [&](int64_t first, int64_t last) {
    auto [k, begin] = run_of(first);
    const auto [last_k, last_end] = run_of(last);
    for (; k < count && k <= last_k; ++k, begin = 0) {
      const int64_t end = k == last_k ? last_end : places[k].numel;
      if (begin < end) {
        body(k, begin, end);
      }
    }
  });
}

}  // namespace fuseer
