// How do Sinkhorn's column potentials come about on the CPU? The row-softmax dual form of kernels/sinkhorn/reference.py, in powers of two.
#include "potentials_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace fuseer {
namespace {

constexpr int64_t kColumnBlock = 1024;
constexpr int64_t kBlockRows = 32;  // rows summed in float32 before they join a float64 sum

// With logits within 2^+-52 and potentials within 2^+-56, products of up to 2^18 columns and their sums stay in float32, and in
// full precision: exponentials can be stored once and multiplied. Cosines at epsilon 0.05 always are within.
constexpr double kLogitRange = 52, kPotentialRange = 56;
constexpr int64_t kSafeColumns = 1 << 18;

template <typename T>
const PotentialsKernels<T>& kernels() {
  return of_type<T>(FUSEER_CHOSEN_KERNELS(potentials_kernels));
}

// `values` reduced over the group, in place.
template <typename T>
void reduce(std::vector<T>& values, const char* reduction, const std::string& group_name) {
  if (group_name.empty()) {
    return;
  }
  at::Tensor tensor = at::empty({static_cast<int64_t>(values.size())}, c10::CppTypeToScalarType<T>::value);
  std::copy(values.begin(), values.end(), tensor.template mutable_data_ptr<T>());
  tensor = all_reduce(tensor, reduction, group_name);
  std::copy_n(tensor.template const_data_ptr<T>(), values.size(), values.begin());
}

}  // namespace

template <typename T>
Potentials<T>::Potentials(const std::vector<std::vector<Segment>>& segments, ScoreType type, int64_t k, double epsilon, T* cache)
    : problems_(static_cast<int64_t>(segments.size())), k_(k), epsilon_(epsilon), cache_(cache) {
  for (const auto& of_problem : segments) {
    for (const Segment& segment : of_problem) {
      rows_ += segment.rows;
    }
  }
  const int64_t threads = std::clamp<int64_t>(rows_ * k / kThreadScores, 1, at::get_num_threads());
  threads_.resize(threads);
  int64_t row = 0, slots = 0;
  for (int64_t p = 0; p < problems_; ++p) {
    slots_.push_back(slots);
    int64_t last_thread = -1;
    for (const Segment& segment : segments[p]) {
      for (int64_t begin = 0; begin < segment.rows;) {
        const int64_t thread = ((row + 1) * threads - 1) / rows_;  // owns rows rows_ * thread / threads and on
        const int64_t count = std::min(segment.rows - begin, rows_ * (thread + 1) / threads - row);
        slots += thread != last_thread;
        last_thread = thread;
        threads_[thread].push_back({{segment.data + begin * segment.stride, type, count, segment.stride, k}, p, row, slots - 1});
        begin += count;
        row += count;
      }
    }
  }
  slots_.push_back(slots);
  partial_ = std::unique_ptr<T[]>(new T[slots * padded(k)]);
  high_.assign(problems_ * padded(k), kAbsent<T>);
  low_.assign(problems_ * padded(k), T(0));
  w_.assign(problems_ * padded(k), T(0));
  for (int64_t p = 0; p < problems_; ++p) {
    std::fill_n(&high_[p * padded(k)], k, T(0));
    std::fill_n(&w_[p * padded(k)], k, T(1));
  }
  in_range_.assign(problems_, true);
  safe_.assign(problems_, true);
}

// Calls body(piece, rows, cache row) for blocks of a thread's rows. Every other sweep goes backwards: it begins with what the one
// before it left in the caches.
template <typename T>
template <typename Body>
void Potentials<T>::for_each_block(int64_t thread, const Body& body) const {
  const std::vector<Piece>& pieces = threads_[thread];
  const bool backwards = sweeps_ % 2;
  for (size_t at = 0; at < pieces.size(); ++at) {
    const Piece& piece = pieces[backwards ? pieces.size() - 1 - at : at];
    const int64_t blocks = (piece.rows.count + kBlockRows - 1) / kBlockRows;
    for (int64_t number = 0; number < blocks; ++number) {
      const int64_t begin = (backwards ? blocks - 1 - number : number) * kBlockRows;
      Rows rows = piece.rows;
      rows.data = static_cast<const char*>(rows.data) + begin * rows.stride;
      rows.count = std::min(kBlockRows, piece.rows.count - begin);
      body(piece, rows, piece.row + begin);
    }
  }
}

// partial(slot) <- what body(piece, rows, cache row, row buffer, sums) adds to `sums` for all rows of the slot. A thread hands over
// one row of sums for each problem it meets: what the next step reads of another core's cache. Problems to `skip` keep theirs.
template <typename T>
template <typename Body>
void Potentials<T>::column_sums(const std::vector<char>& skip, const Body& body) {
  at::parallel_for(0, static_cast<int64_t>(threads_.size()), 1, [&](int64_t first, int64_t last) {
    const int64_t width = padded(k_);
    std::unique_ptr<T[]> buffer(new T[width]), sums(new T[width]());
    std::unique_ptr<double[]> total(new double[width]());
    int64_t slot = -1;
    const auto leave = [&] {
      if (slot >= 0) {
        std::copy_n(total.get(), width, partial(slot));
        std::fill_n(total.get(), width, 0.0);
      }
    };
    for (int64_t thread = first; thread < last; ++thread) {
      for_each_block(thread, [&](const Piece& piece, const Rows& rows, int64_t row) {
        if (skip[piece.problem]) {
          return;
        }
        if (slot != piece.slot) {
          leave();
          slot = piece.slot;
        }
        body(piece, rows, row, buffer.get(), sums.get());
        kernels<T>().flush(sums.get(), width, total.get());
      });
    }
    leave();
  });
  ++sweeps_;
}

template <typename T>
template <typename Body>
void Potentials<T>::for_each_column_block(const Body& body) const {
  const int64_t blocks = (k_ + kColumnBlock - 1) / kColumnBlock;
  at::parallel_for(0, problems_ * blocks, 1 + 2 * kThreadScores / kColumnBlock, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block % blocks * kColumnBlock;
      body(block, block / blocks, begin, std::min(begin + kColumnBlock, k_));
    }
  });
}

template <typename T>
void Potentials<T>::iterate(int64_t iterations, const std::string& group_name, std::vector<double>& passengers) {
  first_step(group_name, passengers);
  for (int64_t step = 1; step < iterations; ++step) {
    next_step(group_name);
  }
}

template <typename T>
void Potentials<T>::first_step(const std::string& group_name, std::vector<double>& passengers) {
  constexpr T infinity = std::numeric_limits<T>::infinity();
  std::vector<T> range(2 * (slots_.back() + 1));
  for (size_t i = 0; i < range.size(); i += 2) {
    range[i] = infinity;
    range[i + 1] = -infinity;
  }
  column_sums(std::vector<char>(problems_, false), [&](const Piece& piece, const Rows& rows, int64_t row, T*, T* sums) {
    kernels<T>().first(rows, epsilon_, cache_ == nullptr ? nullptr : cache_ + row * k_, sums, &range[2 * piece.slot]);
  });
  const double factor = kPowersPerNat / epsilon_;
  for (int64_t p = 0; p < problems_; ++p) {
    for (int64_t slot = slots_[p]; slot < slots_[p + 1]; ++slot) {
      if (!(range[2 * slot] * factor >= -kLogitRange && range[2 * slot + 1] * factor <= kLogitRange)) {
        in_range_[p] = false;
      }
    }
  }
  if (group_name.empty() && std::all_of(in_range_.begin(), in_range_.end(), [](char fits) { return fits; })) {
    finish(group_name, &passengers);
    return;
  }
  shift_columns(group_name);
  shift_sums();
  finish(group_name, &passengers);
}

// The potentials before the first step lower the exponents: by a column's largest logit, or by 0 where all the problem's logits are
// in range (that is large enough, and the sums are there already); over the ranks of a group by the largest of these, [problems, k] in nats.
template <typename T>
void Potentials<T>::shift_columns(const std::string& group_name) {
  constexpr T infinity = std::numeric_limits<T>::infinity();
  const int64_t width = padded(k_);
  std::vector<T> tops(slots_.back() * width, -infinity), shift(problems_ * k_, -infinity);
  at::parallel_for(0, static_cast<int64_t>(threads_.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      for_each_block(thread, [&](const Piece& piece, const Rows& rows, int64_t) {
        if (!in_range_[piece.problem]) {
          kernels<T>().column_max(rows, &tops[piece.slot * width]);
        }
      });
    }
  });
  for (int64_t p = 0; p < problems_; ++p) {
    for (int64_t slot = slots_[p]; slot < slots_[p + 1]; ++slot) {
      for (int64_t j = 0; j < k_; ++j) {
        T& column = shift[p * k_ + j];
        const T top = in_range_[p] ? T(0) : static_cast<T>(tops[slot * width + j] / epsilon_);
        column = top > column || std::isnan(top) ? top : column;
      }
    }
  }
  reduce(shift, "max", group_name);
  for (int64_t p = 0; p < problems_; ++p) {
    for (int64_t j = 0; j < k_; ++j) {
      const T top = shift[p * k_ + j];
      const double v = top == -infinity ? 0.0 : -top * kPowersPerNat;
      high_[p * width + j] = static_cast<T>(v);
      low_[p * width + j] = static_cast<T>(v - high_[p * width + j]);
      w_[p * width + j] = static_cast<T>(std::exp2(v));
    }
  }
}

// The first column sums, with the exponents lowered: those that are there already are scaled.
template <typename T>
void Potentials<T>::shift_sums() {
  for (int64_t p = 0; p < problems_; ++p) {
    for (int64_t slot = slots_[p]; in_range_[p] && slot < slots_[p + 1]; ++slot) {
      for (int64_t j = 0; j < k_; ++j) {
        partial(slot)[j] *= columns(p).w[j];
      }
    }
  }
  column_sums(in_range_, [&](const Piece& piece, const Rows& rows, int64_t, T*, T* sums) {
    kernels<T>().shifted(rows, epsilon_, columns(piece.problem), sums);
  });
}

template <typename T>
void Potentials<T>::next_step(const std::string& group_name) {
  column_sums(std::vector<char>(problems_, false), [&](const Piece& piece, const Rows& rows, int64_t row, T* buffer, T* sums) {
    const int64_t p = piece.problem;
    if (cached(p)) {
      kernels<T>().cached(cache_ + row * k_, rows.count, k_, columns(p).w, sums);
    } else {
      kernels<T>().sweep(rows, epsilon_, columns(p), safe_[p], buffer, sums);
    }
  });
  finish(group_name, nullptr);
}

// v <- v - log2(sums over all threads and ranks)
template <typename T>
void Potentials<T>::finish(const std::string& group_name, std::vector<double>* passengers) {
  const bool first = passengers != nullptr;
  const int64_t blocks = (k_ + kColumnBlock - 1) / kColumnBlock;
  std::vector<T> largest(problems_ * blocks);
  std::vector<T> sums(problems_ * k_);
  const auto add = [&](int64_t, int64_t p, int64_t begin, int64_t end) {
    const T* w = !first && cached(p) ? columns(p).w : nullptr;
    kernels<T>().combine(partial(slots_[p]), slots_[p + 1] - slots_[p], padded(k_), w, begin, end, &sums[p * k_]);
  };
  const auto update = [&](int64_t block, int64_t p, int64_t begin, int64_t end) {
    const int64_t at = p * padded(k_);
    largest[block] = kernels<T>().update(&sums[p * k_], begin, end, &high_[at], &low_[at], &w_[at]);
  };
  if (group_name.empty()) {
    for_each_column_block([&](int64_t block, int64_t p, int64_t begin, int64_t end) {
      add(block, p, begin, end);
      update(block, p, begin, end);
    });
  } else {
    for_each_column_block(add);
    if (first) {
      sums.insert(sums.end(), passengers->begin(), passengers->end());
    }
    reduce(sums, "sum", group_name);
    if (first) {
      passengers->assign(sums.begin() + problems_ * k_, sums.end());
    }
    for_each_column_block(update);
  }
  for (int64_t p = 0; p < problems_; ++p) {
    const auto begin = largest.begin() + p * blocks;
    const bool bounded = std::all_of(begin, begin + blocks, [](T x) { return x <= T(kPotentialRange); });
    // Once lost it stays lost: w may have left the range of T.
    safe_[p] = safe_[p] && in_range_[p] && bounded && k_ <= kSafeColumns;
  }
}

template <typename T>
void Potentials<T>::write_codes(T* codes) const {
  const bool stream = rows_ * k_ * static_cast<int64_t>(sizeof(T)) > kStreamedBytes;
  at::parallel_for(0, static_cast<int64_t>(threads_.size()), 1, [&](int64_t first, int64_t last) {
    std::unique_ptr<T[]> buffer(new T[padded(k_)]);
    for (int64_t thread = first; thread < last; ++thread) {
      for_each_block(thread, [&](const Piece& piece, const Rows& rows, int64_t row) {
        const int64_t p = piece.problem;
        if (cached(p)) {
          kernels<T>().scale(codes + row * k_, rows.count, k_, columns(p).w, stream);
        } else {
          kernels<T>().codes(rows, epsilon_, columns(p), safe_[p], buffer.get(), codes + row * k_, stream);
        }
      });
    }
  });
}

template <typename T>
at::Tensor Potentials<T>::in_nats() const {
  at::Tensor out = at::empty({problems_, k_}, at::kDouble);
  double* x = out.mutable_data_ptr<double>();
  for (int64_t p = 0; p < problems_; ++p) {
    for (int64_t j = 0; j < k_; ++j) {
      const int64_t at = p * padded(k_) + j;
      x[p * k_ + j] = (static_cast<double>(high_[at]) + low_[at]) / kPowersPerNat;
    }
  }
  return out;
}

template class Potentials<float>;
template class Potentials<double>;

}  // namespace fuseer
