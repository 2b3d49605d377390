// How is a run of score rows swept with vectors to find column potentials? Compiled once per instruction set.
#include "potentials_cpu.h"
#include "simd.h"

namespace fuseer {
namespace CPU_CAPABILITY {
namespace {

template <typename scalar_t>
const scalar_t* row_of(const Rows& rows, int64_t i) {
  return static_cast<const scalar_t*>(rows.data) + i * (rows.stride / static_cast<int64_t>(sizeof(scalar_t)));
}

inline int64_t lanes_left(int64_t j, int64_t k, int64_t lanes) {
  return k - j < lanes ? k - j : lanes;
}

// sums <- sums + 2^(logits of R rows), which go to `cache` as well. A NaN may be missing from the range; the sums keep it.
template <typename scalar_t, int R>
inline void first_rows(const Rows& rows, int64_t i, const Factor<Acc<scalar_t>>& factor, Acc<scalar_t>* cache, Acc<scalar_t>* sums,
                       Vec<Acc<scalar_t>>& smallest, Vec<Acc<scalar_t>>& largest) {
  using T = Acc<scalar_t>;
  constexpr int64_t lanes = Vec<T>::size();
  const scalar_t* x[R];
  for (int r = 0; r < R; ++r) {
    x[r] = row_of<scalar_t>(rows, i + r);
  }
  const auto step = [&](int64_t j, int64_t left) {
    Vec<T> sum = Vec<T>::loadu(sums + j);
    for (int r = 0; r < R; ++r) {
      const Vec<T> scores = left < lanes ? read(x[r] + j, left, T(0)) : read(x[r] + j);
      smallest = at_most(smallest, scores);
      largest = at_least(largest, scores);
      const Vec<T> e = factor.powers(scores);
      if (cache != nullptr) {
        e.store(cache + r * rows.k + j, static_cast<int>(left));
      }
      sum = sum + e;
    }
    sum.store(sums + j);
  };
  int64_t j = 0;
  for (; j + lanes <= rows.k; j += lanes) {
    step(j, lanes);
  }
  if (j < rows.k) {
    step(j, rows.k - j);
  }
}

template <typename scalar_t>
void first(const Rows& rows, double epsilon, Acc<scalar_t>* cache, Acc<scalar_t>* sums, Acc<scalar_t>* range) {
  using T = Acc<scalar_t>;
  const Factor<T> factor(epsilon);
  Vec<T> smallest(range[0]), largest(range[1]);
  int64_t i = 0;
  for (; i + 4 <= rows.count; i += 4) {
    first_rows<scalar_t, 4>(rows, i, factor, cache == nullptr ? nullptr : cache + i * rows.k, sums, smallest, largest);
  }
  for (; i < rows.count; ++i) {
    first_rows<scalar_t, 1>(rows, i, factor, cache == nullptr ? nullptr : cache + i * rows.k, sums, smallest, largest);
  }
  range[0] = -widest(smallest.neg());
  range[1] = widest(largest);
}

template <typename scalar_t>
void column_max(const Rows& rows, Acc<scalar_t>* top) {
  using T = Acc<scalar_t>;
  for (int64_t i = 0; i < rows.count; ++i) {
    over_row(row_of<scalar_t>(rows, i), rows.k, -kInfinity<T>, [&](int64_t j, const Vec<T>& scores) {
      at::vec::maximum(Vec<T>::loadu(top + j), scores).store(top + j);
    });
  }
}

template <typename scalar_t>
void shifted(const Rows& rows, double epsilon, const Columns<Acc<scalar_t>>& shift, Acc<scalar_t>* sums) {
  using T = Acc<scalar_t>;
  const Factor<T> factor(epsilon);
  for (int64_t i = 0; i < rows.count; ++i) {
    over_row(row_of<scalar_t>(rows, i), rows.k, T(0), [&](int64_t j, const Vec<T>& scores) {
      const Vec<T> logits = factor.logits(scores, Vec<T>::loadu(shift.high + j)) + Vec<T>::loadu(shift.low + j);
      (Vec<T>::loadu(sums + j) + power(logits)).store(sums + j);
    });
  }
}

// dots_r = sum_j e_rj w_j of R neighbouring rows of the cache.
template <typename T, int R>
inline void row_sums(const T* cache, int64_t k, const T* w, double* dots) {
  constexpr int64_t lanes = Vec<T>::size();
  for (int r = 0; r < R; ++r) {
    dots[r] = 0;
  }
  for (int64_t begin = 0; begin < k; begin += kChunk) {
    const int64_t end = begin + kChunk < k ? begin + kChunk : k;
    Vec<T> sum[R];
    for (int r = 0; r < R; ++r) {
      sum[r] = Vec<T>(T(0));
    }
    int64_t j = begin;
    for (; j + lanes <= end; j += lanes) {
      const Vec<T> weight = Vec<T>::loadu(w + j);
      for (int r = 0; r < R; ++r) {
        sum[r] = at::vec::fmadd(Vec<T>::loadu(cache + r * k + j), weight, sum[r]);
      }
    }
    for (int r = 0; r < R; ++r) {
      if (j < end) {
        sum[r] = at::vec::fmadd(Vec<T>::loadu(cache + r * k + j, end - j), Vec<T>::loadu(w + j), sum[r]);
      }
      dots[r] += total(sum[r]);
    }
  }
}

template <typename T, int R>
inline void cached_rows(const T* cache, int64_t k, const T* w, T* sums) {
  constexpr int64_t lanes = Vec<T>::size();
  double dots[R];
  row_sums<T, R>(cache, k, w, dots);
  Vec<T> scale[R];
  for (int r = 0; r < R; ++r) {
    scale[r] = Vec<T>(static_cast<T>(1 / dots[r]));
  }
  int64_t j = 0;
  for (; j + lanes <= k; j += lanes) {
    Vec<T> sum = Vec<T>::loadu(sums + j);
    for (int r = 0; r < R; ++r) {
      sum = at::vec::fmadd(Vec<T>::loadu(cache + r * k + j), scale[r], sum);
    }
    sum.store(sums + j);
  }
  if (j < k) {
    Vec<T> sum = Vec<T>::loadu(sums + j);
    for (int r = 0; r < R; ++r) {
      sum = at::vec::fmadd(Vec<T>::loadu(cache + r * k + j, k - j), scale[r], sum);
    }
    sum.store(sums + j);
  }
}

template <typename T>
void cached(const T* cache, int64_t count, int64_t k, const T* w, T* sums) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    cached_rows<T, 4>(cache + i * k, k, w, sums);
  }
  for (; i < count; ++i) {
    cached_rows<T, 1>(cache + i * k, k, w, sums);
  }
}

// row <- 2^(logits + v), divided by 2^(about their maximum) unless it is safe not to; returns 1 / their sum.
template <typename scalar_t>
inline Vec<Acc<scalar_t>> exponentials(const scalar_t* x, int64_t k, const Factor<Acc<scalar_t>>& factor, const Columns<Acc<scalar_t>>& v,
                                       bool safe, Acc<scalar_t>* row) {
  using T = Acc<scalar_t>;
  Vec<T> shift(T(0));
  if (!safe) {
    Vec<T> top(-kInfinity<T>);
    over_row(x, k, T(0), [&](int64_t j, const Vec<T>& scores) {
      top = at::vec::maximum(top, factor.logits(scores, Vec<T>::loadu(v.high + j)));
    });
    shift = Vec<T>(-widest(top));
  }
  Sum<T> sum;
  const auto keep = [&](int64_t j, const Vec<T>& logits) {
    const Vec<T> e = power(logits);
    e.store(row + j);
    sum.part = sum.part + e;
  };
  const auto plain = [&](int64_t j, const Vec<T>& scores) {
    keep(j, factor.logits(scores, Vec<T>::loadu(v.high + j)) + Vec<T>::loadu(v.low + j));
  };
  const auto shifted = [&](int64_t j, const Vec<T>& scores) {
    // Potential and maximum may both be thousands, and a score may cancel either: nothing of their sum may be lost.
    const TwoSum<T> bias(Vec<T>::loadu(v.high + j), shift);
    keep(j, factor.logits(scores, bias.sum) + (bias.lost + Vec<T>::loadu(v.low + j)));
  };
  const auto close = [&] { sum.close(); };
  if (safe) {
    over_chunks(x, k, T(0), plain, close);
  } else {
    over_chunks(x, k, T(0), shifted, close);
  }
  return Vec<T>(static_cast<T>(1 / sum.whole));
}

template <typename scalar_t>
void sweep(const Rows& rows, double epsilon, const Columns<Acc<scalar_t>>& v, bool safe, Acc<scalar_t>* row, Acc<scalar_t>* sums) {
  using T = Acc<scalar_t>;
  const Factor<T> factor(epsilon);
  for (int64_t i = 0; i < rows.count; ++i) {
    const Vec<T> scale = exponentials(row_of<scalar_t>(rows, i), rows.k, factor, v, safe, row);
    for (int64_t j = 0; j < rows.k; j += Vec<T>::size()) {
      at::vec::fmadd(Vec<T>::loadu(row + j), scale, Vec<T>::loadu(sums + j)).store(sums + j);
    }
  }
}

template <typename T>
void scale(T* cache, int64_t count, int64_t k, const T* w, bool stream) {
  constexpr int64_t lanes = Vec<T>::size();
  alignas(64) T chunk[kChunk];
  for (int64_t i = 0; i < count; ++i, cache += k) {
    double dot;
    row_sums<T, 1>(cache, k, w, &dot);
    const Vec<T> scale(static_cast<T>(1 / dot));
    if (!stream) {
      for (int64_t j = 0; j < k; j += lanes) {
        const int64_t left = lanes_left(j, k, lanes);
        (Vec<T>::loadu(cache + j, left) * (Vec<T>::loadu(w + j) * scale)).store(cache + j, static_cast<int>(left));
      }
      continue;
    }
    for (int64_t begin = 0; begin < k; begin += kChunk) {
      const int64_t end = begin + kChunk < k ? begin + kChunk : k;
      for (int64_t j = begin; j < end; j += lanes) {
        const Vec<T> e = Vec<T>::loadu(cache + j, lanes_left(j, k, lanes));
        (e * (Vec<T>::loadu(w + j) * scale)).store(chunk + (j - begin));
      }
      put(cache + begin, chunk, end - begin, stream);
    }
  }
  fence_streams();
}

template <typename scalar_t>
void codes(const Rows& rows, double epsilon, const Columns<Acc<scalar_t>>& v, bool safe, Acc<scalar_t>* row, Acc<scalar_t>* out,
           bool stream) {
  using T = Acc<scalar_t>;
  const Factor<T> factor(epsilon);
  for (int64_t i = 0; i < rows.count; ++i, out += rows.k) {
    const Vec<T> scale = exponentials(row_of<scalar_t>(rows, i), rows.k, factor, v, safe, row);
    for (int64_t j = 0; j < rows.k; j += Vec<T>::size()) {
      (Vec<T>::loadu(row + j) * scale).store(row + j);
    }
    put_bytes(out, row, rows.k * sizeof(T), stream);
  }
  fence_streams();
}

template <typename T>
void flush(T* sums, int64_t k, double* total) {
  for (int64_t j = 0; j < k; ++j) {
    total[j] += sums[j];
    sums[j] = T(0);
  }
}

template <typename T>
void combine(const T* partial, int64_t slots, int64_t stride, const T* w, int64_t begin, int64_t end, T* sums) {
  for (int64_t first = begin; first < end; first += kLanes) {
    double sum[kLanes] = {};
    for (int64_t slot = 0; slot < slots; ++slot) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        sum[lane] += partial[slot * stride + first + lane];
      }
    }
    for (int64_t j = first; j < end && j < first + kLanes; ++j) {
      sums[j] = static_cast<T>(w == nullptr ? sum[j - first] : sum[j - first] * w[j]);
    }
  }
}

template <typename T>
T update(const T* sums, int64_t begin, int64_t end, T* high, T* low, T* w) {
  constexpr int64_t lanes = Vec<T>::size();
  Vec<T> largest(T(0));
  for (int64_t j = begin; j < end; j += lanes) {
    const int64_t left = lanes_left(j, end, lanes);
    const auto part = [&](const T* x, T fill) { return left < lanes ? read(x + j, left, fill) : Vec<T>::loadu(x + j); };
    // 1 stands for a sum of nothing (no rows, no finite score) and for what is beyond the end: its potential stays, and is not large.
    const Vec<T> found = part(sums, T(1)), sum = Vec<T>::blendv(found, Vec<T>(T(1)), found == Vec<T>(T(0)));
    const Vec<T> weight = part(w, T(1)) / sum;
    const TwoSum<T> next(part(high, T(0)), part(low, T(0)) - sum.log2());
    largest = at::vec::maximum(largest, next.sum.abs());
    next.sum.store(high + j, static_cast<int>(left));
    next.lost.store(low + j, static_cast<int>(left));
    weight.store(w + j, static_cast<int>(left));
  }
  return widest(largest);
}

}  // namespace

extern const PotentialsKernelSet potentials_kernels = {
    {
        [](const Rows& rows, double epsilon, float* cache, float* sums, float* range) {
          FUSEER_OF_FLOAT(rows.type, first, rows, epsilon, cache, sums, range)
        },
        [](const Rows& rows, float* top) { FUSEER_OF_FLOAT(rows.type, column_max, rows, top) },
        [](const Rows& rows, double epsilon, const Columns<float>& shift, float* sums) { FUSEER_OF_FLOAT(rows.type, shifted, rows, epsilon, shift, sums) },
        cached<float>,
        [](const Rows& rows, double epsilon, const Columns<float>& v, bool safe, float* row, float* sums) {
          FUSEER_OF_FLOAT(rows.type, sweep, rows, epsilon, v, safe, row, sums)
        },
        scale<float>,
        [](const Rows& rows, double epsilon, const Columns<float>& v, bool safe, float* row, float* out, bool stream) {
          FUSEER_OF_FLOAT(rows.type, codes, rows, epsilon, v, safe, row, out, stream)
        },
        flush<float>,
        combine<float>,
        update<float>,
    },
    {first<double>, column_max<double>, shifted<double>, cached<double>, sweep<double>, scale<double>, codes<double>,
     flush<double>, combine<double>, update<double>},
};

}  // namespace CPU_CAPABILITY
}  // namespace fuseer
