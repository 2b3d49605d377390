// How does fuseer::lars_update_ run on the CPU? Sums of squares, then the update; alone, of a few layers at a time, while caches hold them.
#include "lars_update_cpu.h"

#include "../library.h"
#include "../lists.h"

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

namespace fuseer {
namespace {

// Weights and gradients of layers that are summed and updated together: as much as the caches keep until the update.
constexpr int64_t kCachedBytes = 4 << 20;

struct Options {
  double lr, momentum, weight_decay, trust_coefficient, eps;
  bool of_norms;  // the denominator is the sum of two norms, not the norm of a sum
  bool lr_in_momentum, nesterov, clip;
};

// A layer's elements, or those of one piece of it; its runs of kRun elements leave their sums from `sums` on.
struct Piece {
  int64_t layer;
  int64_t sums;
};

// Pieces in the order of their layers, side by side with what lies at them.
struct Pieces {
  std::vector<Place> places;
  std::vector<Piece> pieces;
  int64_t runs = 0;

  void add(const Place& whole, int64_t start, int64_t numel, int64_t layer) {
    const auto from = [start](const Flat& x) { return Flat{x.data + start * bytes_of(x.type), x.type}; };
    places.push_back({from(whole.target), from(whole.source), from(whole.other), numel});
    pieces.push_back({layer, runs});
    runs += (numel + kRun - 1) / kRun;
  }
};

// ValueError, in the words of kernels/checks.py, which a compiled graph does not ask.
void check_segments(const int64_t* rows, int64_t count, const std::vector<Place>& tensors, int64_t layers) {
  std::vector<std::array<int64_t, 4>> sorted(count);
  std::copy_n(rows, 4 * count, sorted.empty() ? nullptr : sorted[0].data());
  std::sort(sorted.begin(), sorted.end());
  std::vector<int64_t> ends(tensors.size());
  const int64_t whole = tensors.size();
  for (int64_t row = 0; row < count; ++row) {
    const auto [tensor, start, numel, layer] = sorted[row];
    const bool inside = 0 <= tensor && tensor < whole && 0 <= layer && layer < layers && numel >= 0;
    TORCH_CHECK_VALUE(inside && start >= ends[tensor] && numel <= tensors[tensor].numel - start, "lars_update_: segments must lie inside ",
                      whole, " tensors and ", layers, " layers and not overlap; row ", row, " in order of start is [", tensor, ", ", start,
                      ", ", numel, ", ", layer, "]");
    ends[tensor] = start + numel;
  }
}

Pieces pieces_of(const std::vector<Place>& tensors, const std::optional<at::Tensor>& segments, int64_t layers) {
  Pieces found;
  if (!segments.has_value()) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      found.add(tensors[i], 0, tensors[i].numel, i);
    }
    return found;
  }
  const at::Tensor table = segments->contiguous();
  const int64_t* rows = table.const_data_ptr<int64_t>();
  check_segments(rows, table.size(0), tensors, layers);
  std::vector<int64_t> order(table.size(0));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [rows](int64_t a, int64_t b) { return rows[4 * a + 3] < rows[4 * b + 3]; });
  for (const int64_t row : order) {
    found.add(tensors[rows[4 * row]], rows[4 * row + 1], rows[4 * row + 2], rows[4 * row + 3]);
  }
  return found;
}

class Lars {
 public:
  Lars(const Pieces& all, const c10::List<bool>& adapt, const Options& options)
      : all_(all),
        options_(options),
        partial_(3 * all.runs),
        steps_(adapt.size()),
        adapt_(adapt.begin(), adapt.end()),
        squares_(at::zeros({static_cast<int64_t>(adapt.size()), 3}, at::kDouble)) {}

  // Sums of pieces begin to end; deterministic for any number of threads, since those of runs are added in their order.
  void sum(int64_t begin, int64_t end) {
    over_places(&all_.places[begin], end - begin, [&](int64_t k, int64_t from, int64_t to) {
      const Place& place = all_.places[begin + k];
      for (int64_t at = from; at < to; at += kRun) {
        double* sums = &partial_[3 * (all_.pieces[begin + k].sums + at / kRun)];
        kernels(place).squares(place, at, std::min(to, at + kRun), options_.weight_decay, sums);
      }
    });
    double* sums = squares_.mutable_data_ptr<double>();
    for (int64_t k = begin; k < end; ++k) {
      const int64_t runs = (all_.places[k].numel + kRun - 1) / kRun;
      for (int64_t j = 3 * all_.pieces[k].sums; j < 3 * (all_.pieces[k].sums + runs); ++j) {
        sums[3 * all_.pieces[k].layer + j % 3] += partial_[j];
      }
    }
  }

  void reduce(const std::string& group_name) { squares_ = all_reduce(squares_, "sum", group_name).contiguous(); }

  void update(int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      steps_[all_.pieces[k].layer] = step_of(all_.pieces[k].layer);
    }
    over_places(&all_.places[begin], end - begin, [&](int64_t k, int64_t from, int64_t to) {
      const Place& place = all_.places[begin + k];
      kernels(place).update(place, from, to, steps_[all_.pieces[begin + k].layer]);
    });
  }

  // Both, for as many layers at a time as caches hold.
  void sum_and_update() {
    const int64_t count = all_.places.size();
    for (int64_t begin = 0, end = 0; begin < count; begin = end) {
      int64_t bytes = 0;
      do {
        bytes += all_.places[end].numel * (bytes_of(all_.places[end].target.type) + bytes_of(all_.places[end].source.type));
        ++end;
      } while (end < count && (bytes < kCachedBytes || all_.pieces[end].layer == all_.pieces[end - 1].layer));
      sum(begin, end);
      update(begin, end);
    }
  }

 private:
  static const LarsKernels& kernels(const Place& place) {
    const LarsKernelSet& set = FUSEER_CHOSEN_KERNELS(lars_kernels);
    return place.target.type == ScoreType::f64 ? set.of_double : set.of_float;
  }

  LarsStep step_of(int64_t layer) const {
    const double* sums = squares_.const_data_ptr<double>() + 3 * layer;
    const double w = std::sqrt(sums[0]), g = std::sqrt(sums[1]), both = std::sqrt(sums[2]);
    const double below = options_.of_norms ? g + options_.weight_decay * w : both;
    double decay = options_.weight_decay, ratio = 1;
    if (adapt_[layer] && w > 0 && (options_.of_norms ? g : both) > 0) {
      ratio = options_.trust_coefficient * w / (below + options_.eps);
      // not std::min: a NaN has to stay one
      ratio = options_.clip ? (ratio / options_.lr > 1 ? 1 : ratio / options_.lr) : ratio;
    } else if (adapt_[layer] && options_.of_norms) {
      decay = 0;
    }
    const bool inside = options_.lr_in_momentum;
    return {decay, inside ? ratio * options_.lr : ratio, options_.momentum, inside ? 1 : options_.lr, options_.nesterov};
  }

  const Pieces& all_;
  const Options& options_;
  std::vector<double> partial_;
  std::vector<LarsStep> steps_;
  std::vector<bool> adapt_;
  at::Tensor squares_;
};

}  // namespace

void lars_update_cpu(at::TensorList params, at::TensorList grads, at::TensorList momenta, double lr, double momentum, double weight_decay,
                     double trust_coefficient, double eps, std::string denominator, c10::List<bool> adapt, bool lr_in_momentum,
                     bool nesterov, bool clip, const std::optional<at::Tensor>& skip, const std::optional<at::Tensor>& segments,
                     std::string group_name) {
  const bool skipped = skip.has_value() && skip->is_nonzero();
  if (skipped && group_name.empty()) {
    return;
  }
  const Places tensors("lars_update_", params, grads, momenta);
  const Pieces pieces = pieces_of(tensors.all, segments, adapt.size());
  const Options options{lr, momentum, weight_decay, trust_coefficient, eps, denominator == "sum", lr_in_momentum, nesterov, clip};
  Lars lars(pieces, adapt, options);
  if (group_name.empty()) {
    lars.sum_and_update();
  } else {
    const int64_t count = pieces.places.size();
    lars.sum(0, count);
    lars.reduce(group_name);
    // a rank that skips has joined the others all the same
    if (skipped) {
      return;
    }
    lars.update(0, count);
  }
  tensors.write_back();
}

}  // namespace fuseer
