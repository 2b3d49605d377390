// How do the loss and the gradient of fuseer::info_nce come about on the CPU? In one pass over the keys, each thread its own run of them.
#include "../library.h"
#include "../tiles_cpu.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <memory>

namespace fuseer {
namespace {

constexpr int64_t kKeys = 256, kQueries = 256;  // a tile of these sides, its keys and its weights stay in L2
constexpr int64_t kStride = (kKeys + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);

at::Tensor with_neighbouring_numbers(const at::Tensor& x) {
  const at::Tensor rows = rows_in_one_piece(x);
  // pairs of bfloat16 numbers travel together
  return rows.scalar_type() == at::kBFloat16 && rows.stride(0) % 2 == 1 ? rows.contiguous() : rows;
}

// Queries and keys; the positive of query n is a row of `positives`: its own, or where indices are given that one, which is a key.
struct Problem {
  Problem(const at::Tensor& query_any, const at::Tensor& keys_any, const std::optional<at::Tensor>& positive,
          const std::optional<at::Tensor>& positive_index, double temperature, bool normalize)
      : query(with_neighbouring_numbers(query_any)),
        keys(with_neighbouring_numbers(keys_any)),
        positives(positive.has_value() ? with_neighbouring_numbers(*positive) : keys),
        count(query.size(0)),
        candidates(keys.size(0)),
        width(query.size(1)),
        temperature(temperature),
        normalize(normalize),
        needs_no_maximum(normalize && cosines_need_no_maximum(temperature)),
        indices(count, -1),
        inverses(inverse_norms(query, normalize)),
        positive_inverses(count, 1.0),
        similarities(count) {
    if (positive_index.has_value()) {
      const at::Tensor dense = positive_index->contiguous();
      std::copy_n(dense.const_data_ptr<int64_t>(), count, indices.begin());
    }
    at::parallel_for(0, count, 256, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t p = positive_row(n);
        if (normalize) {
          positive_inverses[n] = 1 / std::max(std::sqrt(dot(positives, p, positives, p)), kLeastNorm);
        }
        similarities[n] = dot(query, n, positives, p) * inverses[n] * positive_inverses[n];
      }
    });
  }
  int64_t positive_row(int64_t n) const { return indices[n] < 0 ? n : indices[n]; }

  at::Tensor query, keys, positives;
  int64_t count, candidates, width;
  double temperature;
  bool normalize, needs_no_maximum;
  std::vector<int64_t> indices;
  std::vector<double> inverses, positive_inverses, similarities;
};

// A run of keys as operands of matrix products: transposed, and as they are. Bfloat16 (E) stays bfloat16; other halves are widened.
template <typename T, typename E>
class Keys {
 public:
  static constexpr bool half = !std::is_same_v<T, E>;

  explicit Keys(const Problem& p)
      : p_(p), transposed_(new E[p.width * kKeys]), widened_(new E[p.width * (kKeys + 1)]), inverses_(kKeys, T(1)) {}

  void take(int64_t first, int64_t count) {
    first_ = first;
    this->count = count;
    const int64_t stride = p_.keys.stride(0), width = p_.width;
    const char* at = static_cast<const char*>(p_.keys.const_data_ptr()) + first * stride * p_.keys.element_size();
    const ScoreType type = score_type(p_.keys, "info_nce");
    if constexpr (half) {
      const auto* rows = reinterpret_cast<const c10::BFloat16*>(at);
      tiles<float>().transpose(reinterpret_cast<const float*>(at), stride / 2, count, width / 2, reinterpret_cast<float*>(transposed_.get()), kKeys);
      interleave(rows, stride, count, width, widened_.get());
      operand_ = widened_.get();
      operand_stride_ = width;
    } else {
      const bool as_it_is = p_.keys.scalar_type() == c10::CppTypeToScalarType<T>::value;
      if (!as_it_is) {
        tiles<T>().widen({at, type, count, stride, width}, nullptr, widened_.get());
      }
      operand_ = as_it_is ? reinterpret_cast<const E*>(at) : widened_.get();
      operand_stride_ = as_it_is ? stride : width;
      tiles<T>().transpose(operand_, operand_stride_, count, width, transposed_.get(), kKeys);
    }
    if (p_.normalize) {
      tiles<T>().inverse_norms({at, type, count, stride, width}, inverses_.data());
    }
  }
  // y = queries [n, n + rows), of `packed`, against the keys taken
  Tile<T> tile(const E* packed, const T* scales, int64_t n, int64_t rows, T* y) const {
    multiply(rows, count, p_.width, packed + n * p_.width, p_.width, transposed_.get(), kKeys, y, kStride, false);
    const bool scaled = half || p_.normalize;
    const Tile<T> made{y, rows, count, kStride, scaled ? scales + n : nullptr, scaled ? inverses_.data() : nullptr};
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t j = p_.indices[n + r] - first_;
      if (j >= 0 && j < count) {
        y[r * kStride + j] = static_cast<T>(p_.temperature < 0 ? kFarBelow : -kFarBelow);
      }
    }
    tiles<T>().blank(made, p_.temperature);
    return made;
  }
  // out [rows, D] += weights * keys
  void add(const Tile<T>& weights, const c10::BFloat16* half_weights, T* out) const {
    if constexpr (half) {
      multiply(weights.rows, p_.width, (count + 1) / 2 * 2, half_weights, kStride, operand_, operand_stride_, out, p_.width, true);
    } else {
      multiply(weights.rows, p_.width, count, weights.y, kStride, operand_, operand_stride_, out, p_.width, true);
    }
  }
  int64_t count = 0;

 private:
  const Problem& p_;
  std::unique_ptr<E[]> transposed_, widened_;
  std::vector<T> inverses_;
  const E* operand_ = nullptr;
  int64_t operand_stride_ = 0, first_ = 0;
};

// What a thread finds about queries [begin, end) in keys [first, last): relative to top, the sums of exponentials, and of keys times them.
template <typename T>
struct Part {
  int64_t begin, end, first, last;
  std::vector<T> top;
  std::vector<double> sums;
  std::unique_ptr<T[]> weighted;
};

template <typename T>
std::vector<Part<T>> dealt(const Problem& p) {
  const int64_t blocks = (p.candidates + kKeys - 1) / kKeys, threads = at::get_num_threads();
  const bool keys_are_dealt = blocks >= threads;
  const int64_t hands = std::clamp<int64_t>(keys_are_dealt ? threads : (p.count + 15) / 16, 1, threads);
  std::vector<Part<T>> parts(hands);
  for (int64_t h = 0; h < hands; ++h) {
    Part<T>& part = parts[h];
    part.begin = keys_are_dealt ? 0 : p.count * h / hands;
    part.end = keys_are_dealt ? p.count : p.count * (h + 1) / hands;
    part.first = keys_are_dealt ? std::min(p.candidates, blocks * h / hands * kKeys) : 0;
    part.last = keys_are_dealt ? std::min(p.candidates, blocks * (h + 1) / hands * kKeys) : p.candidates;
  }
  return parts;
}

template <typename T, typename E>
void sweep(const Problem& p, const E* packed, const T* scales, bool gradient, Part<T>& part) {
  const int64_t rows = part.end - part.begin, width = p.width;
  part.top.assign(rows, T(p.temperature < 0 ? -1 : 1));
  if (!p.needs_no_maximum) {
    std::copy_n(p.similarities.begin() + part.begin, rows, part.top.begin());
  }
  part.sums.assign(rows, 0);
  part.weighted.reset(gradient ? new T[rows * width]() : nullptr);
  Keys<T, E> keys(p);
  std::unique_ptr<T[]> y(new T[kQueries * kStride]);
  std::unique_ptr<c10::BFloat16[]> half(Keys<T, E>::half ? new c10::BFloat16[kQueries * kStride]() : nullptr);
  const ReleasedProducts released;
  for (int64_t first = part.first; first < part.last; first += kKeys) {
    keys.take(first, std::min(kKeys, part.last - first));
    for (int64_t n = 0; n < rows; n += kQueries) {
      const Tile<T> tile = keys.tile(packed, scales, part.begin + n, std::min(kQueries, rows - n), y.get());
      T *top = &part.top[n], *weighted = gradient ? &part.weighted[n * width] : nullptr;
      if (!p.needs_no_maximum) {
        const std::vector<T> before(top, top + tile.rows);
        tiles<T>().tops(tile, p.temperature, top);
        for (int64_t r = 0; r < tile.rows; ++r) {
          const double fallen = std::exp((static_cast<double>(before[r]) - top[r]) / p.temperature);
          part.sums[n + r] *= fallen;
          for (int64_t d = 0; gradient && fallen != 1 && d < width; ++d) {
            weighted[r * width + d] *= static_cast<T>(fallen);
          }
        }
      }
      if (gradient) {
        tiles<T>().powers(tile, p.temperature, top, &part.sums[n], {half.get(), nullptr});
        keys.add(tile, half.get(), weighted);
      } else {
        tiles<T>().sums(tile, p.temperature, top, &part.sums[n], nullptr);
      }
    }
  }
}

// A row of any type, normalised, in double.
void unit_row(const at::Tensor& x, int64_t i, double inverse, std::vector<double>& out) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "info_nce", [&] {
    const scalar_t* row = x.const_data_ptr<scalar_t>() + i * x.stride(0);
    std::transform(row, row + out.size(), out.begin(), [inverse](scalar_t value) { return static_cast<double>(value) * inverse; });
  });
}

// Joins what the parts found about query n; returns its loss, and leaves its gradient in `out` unless that is null.
template <typename T>
double joined(const Problem& p, const std::vector<Part<T>>& parts, int64_t n, T* out) {
  const double sign = p.temperature < 0 ? -1 : 1;
  double top = p.needs_no_maximum ? sign : p.similarities[n], sum = 0;
  const auto concerned = [n](const Part<T>& part) { return part.begin <= n && n < part.end; };
  for (const Part<T>& part : parts) {
    if (concerned(part)) {
      top = sign * std::max(sign * top, sign * part.top[n - part.begin]);
    }
  }
  std::vector<double> d(p.width, 0), z(p.width), of_positive(p.width);
  for (const Part<T>& part : parts) {
    if (concerned(part)) {
      const double share = std::exp((part.top[n - part.begin] - top) / p.temperature);
      sum += share * part.sums[n - part.begin];
      for (int64_t k = 0; out != nullptr && k < p.width; ++k) {
        d[k] += share * part.weighted[(n - part.begin) * p.width + k];
      }
    }
  }
  const double above = (p.similarities[n] - top) / p.temperature;
  if (out != nullptr) {
    unit_row(p.query, n, p.inverses[n], z);
    unit_row(p.positives, p.positive_row(n), p.positive_inverses[n], of_positive);
    const double all = (sum + std::exp(above)) * p.temperature;
    for (int64_t k = 0; k < p.width; ++k) {
      d[k] = (d[k] - sum * of_positive[k]) / all;
    }
    if (p.normalize) {
      through_normalisation(z, p.inverses[n], d);
    }
    std::copy(d.begin(), d.end(), out);
  }
  return excess(sum, above);
}

template <typename T, typename E>
std::tuple<double, at::Tensor> run(const Problem& p, bool gradient) {
  constexpr bool half = Keys<T, E>::half;
  std::unique_ptr<E[]> packed(new E[p.count * p.width]);
  std::vector<T> scales(p.count, T(1));
  if constexpr (half) {
    for (int64_t n = 0; n < p.count; ++n) {
      std::copy_n(p.query.const_data_ptr<c10::BFloat16>() + n * p.query.stride(0), p.width, &packed[n * p.width]);
      scales[n] = static_cast<T>(p.inverses[n]);
    }
  } else {
    tiles<T>().widen({p.query.const_data_ptr(), score_type(p.query, "info_nce"), p.count, p.query.stride(0), p.width}, p.inverses.data(),
                     packed.get());
  }
  std::vector<Part<T>> parts = dealt<T>(p);
  at::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      sweep<T, E>(p, packed.get(), scales.data(), gradient, parts[h]);
    }
  });
  at::Tensor dquery = at::empty(gradient ? p.query.sizes() : at::IntArrayRef{0}, c10::CppTypeToScalarType<T>::value);
  std::vector<double> losses(p.count);
  at::parallel_for(0, p.count, 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      losses[n] = joined(p, parts, n, gradient ? dquery.mutable_data_ptr<T>() + n * p.width : nullptr);
    }
  });
  double loss = 0;
  for (const double of_row : losses) {
    loss += of_row;
  }
  return {loss, dquery};
}

}  // namespace

std::tuple<double, at::Tensor> info_nce_sums_cpu(const at::Tensor& query, const at::Tensor& keys, const std::optional<at::Tensor>& positive,
                                                 const std::optional<at::Tensor>& positive_index, double temperature, bool normalize,
                                                 bool gradient) {
  const Problem p(query, keys, positive, positive_index, temperature, normalize);
  if (query.scalar_type() == at::kDouble) {
    return run<double, double>(p, gradient);
  }
  const bool scalable = can_be_scaled_later(p.inverses) && (!positive_index.has_value() || can_be_scaled_later(p.positive_inverses));
  if (query.scalar_type() == at::kBFloat16 && p.width % 2 == 0 && scalable && multiplies_bfloat16()) {
    return run<float, c10::BFloat16>(p, gradient);
  }
  return run<float, float>(p, gradient);
}

}  // namespace fuseer
