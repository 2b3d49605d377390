// How do the row sums and the gradient of fuseer::nt_xent come about on the CPU? Tile by tile, each above the diagonal used for both its sides.
#include "../library.h"
#include "../tiles_cpu.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <memory>
#include <numeric>

namespace fuseer {
namespace {

constexpr int64_t kBlock = 256;             // a tile of that side, its operands and its weights stay in L2
constexpr int64_t kMirroringThreads = 8;    // more would need more memory for their own sums than their halved work is worth
constexpr int64_t kKeptBytes = 4 << 20;     // of products of the forward that the gradient finds again; all of them up to 2N = 1,300

// Rows [M, D], contiguous, and who among them is whose positive: own rows are [begin, begin + count), first all first views, then all second ones.
struct Problem {
  Problem(const at::Tensor& rows, int64_t begin, int64_t count, double temperature, bool normalize)
      : rows(rows),
        begin(begin),
        count(count),
        total(rows.size(0)),
        width(rows.size(1)),
        temperature(temperature),
        normalize(normalize),
        inverses(inverse_norms(rows, normalize)),
        needs_no_maximum(normalize && cosines_need_no_maximum(temperature)) {
    block = kBlock;
    while (block > 64 && total < 4 * block * at::get_num_threads()) {
      block /= 2;
    }
    blocks = (total + block - 1) / block;
  }
  int64_t positive(int64_t i) const { return begin + (i - begin + count / 2) % count; }
  bool alone() const { return count == total; }
  int64_t threads() const { return std::min<int64_t>(at::get_num_threads(), blocks); }
  bool mirrors() const { return alone() && threads() <= kMirroringThreads; }
  int64_t block_width(int64_t b) const { return std::min(block, total - b * block); }
  int64_t stride() const { return (block + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes); }  // of a tile's rows
  double similarity(int64_t i, int64_t j) const { return dot(rows, i, rows, j) * inverses[i] * inverses[j]; }

  const at::Tensor rows;
  int64_t begin, count, total, width, block, blocks;
  double temperature;
  bool normalize;
  std::vector<double> inverses;
  bool needs_no_maximum;
};

// The rows as operands of matrix products. Float and double: unit rows, and their transposes block by block. Bfloat16 (E): the rows as they
// are, exact in every product, the normalisation being left to the tiles' scales.
template <typename T, typename E>
class Operands {
 public:
  static constexpr bool half = !std::is_same_v<T, E>;

  explicit Operands(const Problem& problem)
      : p_(problem),
        even_((problem.block + 1) / 2 * 2),
        rows_(new E[p_.total * p_.width]),
        columns_(new E[p_.blocks * p_.width * p_.block]),
        scales_(half ? p_.total : 0) {
    if constexpr (half) {
      pairs_.reset(new E[p_.blocks * even_ * p_.width]);
      transposed_.reset(new E[p_.blocks * p_.width * even_]());
      std::copy(p_.inverses.begin(), p_.inverses.end(), scales_.begin());
    }
    at::parallel_for(0, p_.blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        fill(b);
      }
    });
  }

  // y, where rows [i, i + rows) against block b are or will be
  Tile<T> place(int64_t i, int64_t rows, int64_t b, T* y) const {
    return {y, rows, p_.block_width(b), p_.stride(), half ? &scales_[i] : nullptr, half ? &scales_[b * p_.block] : nullptr};
  }
  // y = rows [i, i + rows) against block b
  Tile<T> tile(int64_t i, int64_t rows, int64_t b, T* y) const {
    const Tile<T> made = place(i, rows, b, y);
    const int64_t stride = made.stride, columns = made.columns;
    multiply(rows, columns, p_.width, &rows_[i * p_.width], p_.width, &columns_[b * p_.width * p_.block], p_.block, y, stride, false);
    const T far = static_cast<T>(p_.temperature < 0 ? kFarBelow : -kFarBelow);
    for (int64_t r = 0; r < rows; ++r) {
      for (const int64_t j : {i + r, p_.positive(i + r)}) {
        if (j >= b * p_.block && j < b * p_.block + columns) {
          y[r * stride + j - b * p_.block] = far;
        }
      }
    }
    tiles<T>().blank(made, p_.temperature);
    return made;
  }
  // out [rows, D] += weights * block b
  void add_rows(const Tile<T>& weights, const HalfTile& half_weights, int64_t b, T* out) const {
    const int64_t rows = weights.rows, columns = weights.columns, width = p_.width;
    if constexpr (half) {
      const int64_t even = (columns + 1) / 2 * 2;
      multiply(rows, width, even, half_weights.plain, weights.stride, &pairs_[b * even_ * width], width, out, width, true);
    } else {
      multiply(rows, width, columns, weights.y, weights.stride, &rows_[b * p_.block * width], width, out, width, true);
    }
  }
  // out [D, block] += transpose of (block a) * weights, weights being of all rows of block a
  void add_columns(const Tile<T>& weights, const HalfTile& half_weights, int64_t a, T* out) const {
    const int64_t rows = weights.rows, columns = weights.columns, width = p_.width;
    if constexpr (half) {
      const int64_t even = (rows + 1) / 2 * 2;
      multiply(width, columns, even, &transposed_[a * width * even_], even_, half_weights.interleaved, weights.stride, out, p_.block, true);
    } else {
      multiply(width, columns, rows, &columns_[a * width * p_.block], p_.block, weights.y, weights.stride, out, p_.block, true);
    }
  }
  void unit_row(int64_t i, std::vector<double>& out) const {
    for (int64_t d = 0; d < p_.width; ++d) {
      out[d] = half ? static_cast<double>(rows_[i * p_.width + d]) * p_.inverses[i] : static_cast<double>(rows_[i * p_.width + d]);
    }
  }

 private:
  void fill(int64_t b) {
    const int64_t first = b * p_.block, rows = p_.block_width(b), width = p_.width;
    E* block = &rows_[first * width];
    const at::Tensor source = p_.rows;
    if constexpr (half) {
      std::copy_n(source.const_data_ptr<E>() + first * width, rows * width, block);
    } else {
      const char* at = static_cast<const char*>(source.const_data_ptr()) + first * width * source.element_size();
      tiles<T>().widen({at, score_type(source, "nt_xent"), rows, width, width}, &p_.inverses[first], block);
    }
    if constexpr (half) {
      // pairs of numbers of a row travel together
      tiles<float>().transpose(reinterpret_cast<const float*>(block), width / 2, rows, width / 2,
                               reinterpret_cast<float*>(&columns_[b * width * p_.block]), p_.block);
      interleave(block, width, rows, width, &pairs_[b * even_ * width]);
      for (int64_t d = 0; d < width; ++d) {
        const E* pairs = &columns_[(b * width + d / 2 * 2) * p_.block + d % 2];
        for (int64_t i = 0; i < rows; ++i) {
          transposed_[(b * width + d) * even_ + i] = pairs[2 * i];
        }
      }
    } else {
      tiles<T>().transpose(block, width, rows, width, &columns_[b * width * p_.block], p_.block);
    }
  }

  const Problem& p_;
  const int64_t even_;
  std::unique_ptr<E[]> rows_;        // [M, D]
  std::unique_ptr<E[]> columns_;     // [blocks, D, block]; of bfloat16 [blocks, D / 2, block, 2]
  std::unique_ptr<E[]> pairs_;       // of bfloat16 alone: [blocks, even / 2, D, 2]
  std::unique_ptr<E[]> transposed_;  // of bfloat16 alone: [blocks, D, even], zeros beyond a block's rows
  std::vector<T> scales_;
};

// The scratch of one thread.
template <typename T>
struct Scratch {
  explicit Scratch(const Problem& p, bool half)
      : size(p.block * p.stride()),
        y(new T[size]),
        weights(half ? new c10::BFloat16[2 * size + 2 * p.block * kLanes] : nullptr) {}
  HalfTile halves() const { return weights ? HalfTile{weights.get(), weights.get() + size} : HalfTile{nullptr, nullptr}; }
  int64_t size;
  std::unique_ptr<T[]> y;
  std::unique_ptr<c10::BFloat16[]> weights;
  ReleasedProducts released;
};

// Products of the forward, for the gradient to find again: those of the first pairs of every slot, so many as kKeptBytes hold.
template <typename T>
class Kept {
 public:
  Kept(const Problem& p, int64_t slots)
      : size_(p.block * p.stride()),
        of_a_slot_(std::min((p.blocks * (p.blocks + 1) / 2 + slots - 1) / slots + p.blocks, kKeptBytes / (slots * size_ * int64_t(sizeof(T))))),
        y_(new T[slots * of_a_slot_ * size_]) {}
  // Where the slot's n-th tile is kept; null where it is not.
  T* at(int64_t slot, int64_t n) const { return n < of_a_slot_ ? &y_[(slot * of_a_slot_ + n) * size_] : nullptr; }

 private:
  int64_t size_, of_a_slot_;
  std::unique_ptr<T[]> y_;
};

// The blocks of every thread, so that all have the same number of tiles from their blocks' diagonals on.
std::vector<std::vector<int64_t>> dealt(int64_t blocks, int64_t threads) {
  std::vector<std::vector<int64_t>> hands(threads);
  std::vector<int64_t> tiles(threads);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t least = std::min_element(tiles.begin(), tiles.end()) - tiles.begin();
    hands[least].push_back(b);
    tiles[least] += blocks - b;
  }
  return hands;
}

// body(block a, block b, tile of a against b) for every pair a <= b, each thread in its own `slot`, always the same pairs. A tile that has
// its place in `kept` is made there, or with `made` found there.
template <typename T, typename E, typename Body>
void over_pairs(const Problem& p, const Operands<T, E>& operands, int64_t threads, const Kept<T>* kept, bool made, const Body& body) {
  const auto hands = dealt(p.blocks, threads);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    const Scratch<T> scratch(p, Operands<T, E>::half);
    for (int64_t slot = first; slot < last; ++slot) {
      int64_t n = 0;
      for (const int64_t a : hands[slot]) {
        for (int64_t b = a; b < p.blocks; ++b, ++n) {
          T* place = kept == nullptr ? nullptr : kept->at(slot, n);
          const int64_t i = a * p.block, rows = p.block_width(a);
          const bool found = made && place != nullptr;
          body(slot, a, b, found ? operands.place(i, rows, b, place) : operands.tile(i, rows, b, place ? place : scratch.y.get()),
               scratch.halves());
        }
      }
    }
  });
}

// body(first own row, tile of own rows against block b), own rows by the block, each block of them on one thread.
template <typename T, typename E, typename Body>
void over_own_rows(const Problem& p, const Operands<T, E>& operands, const Body& body) {
  at::parallel_for(0, (p.count + p.block - 1) / p.block, 1, [&](int64_t first, int64_t last) {
    const Scratch<T> scratch(p, Operands<T, E>::half);
    for (int64_t a = first; a < last; ++a) {
      const int64_t i = p.begin + a * p.block, rows = std::min(p.block, p.begin + p.count - i);
      for (int64_t b = 0; b < p.blocks; ++b) {
        body(i, b, operands.tile(i, rows, b, scratch.y.get()), scratch.halves());
      }
    }
  });
}

// The sums of own rows over all but themselves and their positives, relative to `top`, which is raised where no bound is known.
template <typename T, typename E>
std::vector<double> sums_of_others(const Problem& p, const Operands<T, E>& operands, const Kept<T>* kept, std::vector<T>& top) {
  std::vector<double> sums(p.count);
  if (p.alone() && p.needs_no_maximum) {
    const int64_t threads = p.threads();
    std::vector<std::vector<double>> partial(threads, std::vector<double>(p.count));
    over_pairs(p, operands, threads, kept, false, [&](int64_t slot, int64_t a, int64_t b, const Tile<T>& tile, const HalfTile&) {
      double *of_rows = &partial[slot][a * p.block], *of_columns = a == b ? nullptr : &partial[slot][b * p.block];
      tiles<T>().sums(tile, p.temperature, &top[a * p.block], of_rows, of_columns);
    });
    for (const auto& part : partial) {
      std::transform(part.begin(), part.end(), sums.begin(), sums.begin(), std::plus<>());
    }
    return sums;
  }
  over_own_rows(p, operands, [&](int64_t i, int64_t, const Tile<T>& tile, const HalfTile&) {
    T* tops = &top[i - p.begin];
    if (!p.needs_no_maximum) {
      const std::vector<T> before(tops, tops + tile.rows);
      tiles<T>().tops(tile, p.temperature, tops);
      for (int64_t r = 0; r < tile.rows; ++r) {
        sums[i - p.begin + r] *= std::exp((static_cast<double>(before[r]) - tops[r]) / p.temperature);
      }
    }
    tiles<T>().sums(tile, p.temperature, tops, &sums[i - p.begin], nullptr);
  });
  return sums;
}

template <typename T, typename E>
std::tuple<double, at::Tensor> statistics_of(const Problem& p, const Operands<T, E>& operands, const Kept<T>* kept) {
  at::Tensor statistics = at::empty({p.count, 3}, c10::CppTypeToScalarType<T>::value);
  T* out = statistics.mutable_data_ptr<T>();
  std::vector<double> positive(p.count);
  std::vector<T> top(p.count, T(p.temperature < 0 ? -1 : 1));
  at::parallel_for(0, p.count, 256, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      positive[i] = p.similarity(p.begin + i, p.positive(p.begin + i));
      top[i] = p.needs_no_maximum ? top[i] : static_cast<T>(positive[i]);
    }
  });
  const std::vector<double> others = sums_of_others(p, operands, kept, top);
  double loss = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    const double above = (positive[i] - top[i]) / p.temperature, sum = others[i] + std::exp(above);
    loss += excess(others[i], above);
    out[3 * i] = top[i];
    out[3 * i + 1] = static_cast<T>(sum);
    out[3 * i + 2] = static_cast<T>(others[i] / sum);
  }
  return {loss, statistics};
}

// Sums over other rows of (p_ij + p_ji) z_j, for own rows, into out [count, D].
template <typename T, typename E>
void weighted_sums(const Problem& p, const Operands<T, E>& operands, const Kept<T>* kept, const Softmax<T>& softmax, T* out) {
  // other backends may have taken the maxima, on other ranks
  const bool alike = std::all_of(softmax.top, softmax.top + p.total, [&](T top) { return top == softmax.top[0]; });
  const auto paired = [&](const Tile<T>& tile, int64_t i, int64_t b, const HalfTile& half) {
    const int64_t j = b * p.block;
    tiles<T>().pairs(tile, p.temperature, {softmax.top + i, softmax.share + i}, {softmax.top + j, softmax.share + j}, alike, half);
  };
  if (!p.mirrors()) {
    over_own_rows(p, operands, [&](int64_t i, int64_t b, const Tile<T>& tile, const HalfTile& half) {
      paired(tile, i, b, {half.plain, nullptr});
      operands.add_rows(tile, half, b, out + (i - p.begin) * p.width);
    });
    return;
  }
  const int64_t threads = p.threads(), size = p.blocks * p.width * p.block;
  std::vector<std::unique_ptr<T[]>> mirrored(threads);
  for (auto& part : mirrored) {
    part.reset(new T[size]());
  }
  over_pairs(p, operands, threads, kept, true, [&](int64_t slot, int64_t a, int64_t b, const Tile<T>& tile, const HalfTile& half) {
    paired(tile, a * p.block, b, half);
    operands.add_rows(tile, half, b, out + a * p.block * p.width);
    if (a != b) {
      operands.add_columns(tile, half, a, &mirrored[slot][b * p.width * p.block]);
    }
  });
  at::parallel_for(0, p.blocks, 1, [&](int64_t first, int64_t last) {
    std::unique_ptr<T[]> rows(new T[p.block * p.width]);
    for (int64_t b = first; b < last; ++b) {
      for (const auto& part : mirrored) {
        tiles<T>().transpose(&part[b * p.width * p.block], p.block, p.width, p.block_width(b), rows.get(), p.width);
        T* to = out + b * p.block * p.width;
        std::transform(rows.get(), rows.get() + p.block_width(b) * p.width, to, to, std::plus<>());
      }
    }
  });
}

template <typename T, typename E>
at::Tensor gradient_of(const Problem& p, const Operands<T, E>& operands, const Kept<T>* kept, const at::Tensor& of_all,
                       const at::Tensor& of_own, double scale) {
  const T *given = of_all.const_data_ptr<T>(), *own = of_own.const_data_ptr<T>();
  std::vector<T> top(p.total), share(p.total);
  for (int64_t i = 0; i < p.total; ++i) {
    top[i] = given[i * of_all.size(1)];
    share[i] = 1 / given[i * of_all.size(1) + 1];
  }
  at::Tensor gradient = at::zeros({p.count, p.width}, c10::CppTypeToScalarType<T>::value);
  T* out = gradient.mutable_data_ptr<T>();
  weighted_sums(p, operands, kept, {top.data(), share.data()}, out);
  at::parallel_for(0, p.count, 64, [&](int64_t first, int64_t last) {
    std::vector<double> z(p.width), of_positive(p.width), d(p.width);
    for (int64_t i = first; i < last; ++i) {
      const int64_t j = p.positive(p.begin + i) - p.begin;
      operands.unit_row(p.begin + i, z);
      operands.unit_row(p.begin + j, of_positive);
      const double pull = static_cast<double>(own[3 * i + 2]) + own[3 * j + 2];
      for (int64_t k = 0; k < p.width; ++k) {
        d[k] = scale * (out[i * p.width + k] - pull * of_positive[k]);
      }
      if (p.normalize) {
        through_normalisation(z, p.inverses[p.begin + i], d);
      }
      std::copy(d.begin(), d.end(), out + i * p.width);
    }
  });
  return gradient;
}

// Calls run<T, E>() with the type of the arithmetic and that of the matrix products' operands.
template <typename Run>
auto with_types(const Problem& p, const Run& run) {
  if (p.rows.scalar_type() == at::kDouble) {
    return run.template operator()<double, double>();
  }
  if (p.rows.scalar_type() == at::kBFloat16 && p.width % 2 == 0 && can_be_scaled_later(p.inverses) && multiplies_bfloat16()) {
    return run.template operator()<float, c10::BFloat16>();
  }
  return run.template operator()<float, float>();
}

}  // namespace

std::tuple<double, at::Tensor> nt_xent_statistics_cpu(const at::Tensor& rows, int64_t begin, int64_t count, double temperature, bool normalize) {
  const Problem p(rows, begin, count, temperature, normalize);
  return with_types(p, [&]<typename T, typename E>() { return statistics_of<T, E>(p, Operands<T, E>(p), nullptr); });
}

at::Tensor nt_xent_gradient_cpu(const at::Tensor& rows, const at::Tensor& of_all, const at::Tensor& of_own, int64_t begin, int64_t count,
                                double temperature, bool normalize, double scale) {
  const Problem p(rows, begin, count, temperature, normalize);
  return with_types(p, [&]<typename T, typename E>() { return gradient_of<T, E>(p, Operands<T, E>(p), nullptr, of_all, of_own, scale); });
}

std::tuple<double, at::Tensor> nt_xent_alone_cpu(const at::Tensor& rows, double temperature, bool normalize, double scale) {
  const Problem p(rows, 0, rows.size(0), temperature, normalize);
  return with_types(p, [&]<typename T, typename E>() -> std::tuple<double, at::Tensor> {
    const Operands<T, E> operands(p);
    const std::unique_ptr<Kept<T>> kept(p.needs_no_maximum && p.mirrors() ? new Kept<T>(p, p.threads()) : nullptr);
    const auto [loss, statistics] = statistics_of<T, E>(p, operands, kept.get());
    return {loss, gradient_of<T, E>(p, operands, kept.get(), statistics, statistics, scale)};
  });
}

}  // namespace fuseer
