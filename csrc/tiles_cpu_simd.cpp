// How are tiles of similarities exponentiated by vectors? Compiled once per instruction set.
#include "simd.h"
#include "tiles_cpu.h"

namespace fuseer {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kTileColumns = 512;  // the widest tile

// A similarity so far below all others that its power is 0, and finite: what it is multiplied by may have either sign.
template <typename T>
inline T far_below(double temperature) {
  return static_cast<T>(temperature < 0 ? kFarBelow : -kFarBelow);
}

template <typename T>
void transpose(const T* x, int64_t stride, int64_t rows, int64_t columns, T* out, int64_t out_stride) {
  constexpr int64_t side = 16;
  const int64_t whole_rows = rows / side * side, whole_columns = columns / side * side;
  for (int64_t i = 0; i < whole_rows; i += side) {
    for (int64_t j = 0; j < whole_columns; j += side) {
      at::vec::transpose_mxn<T, side, side>(x + i * stride + j, stride, out + j * out_stride + i, out_stride);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j) {
      out[j * out_stride + i] = x[i * stride + j];
    }
  }
}

// body(pointer to the first number of row i), of the rows' own type where its arithmetic is in T
template <typename T, typename Body>
inline void over_rows(const Rows& rows, const Body& body) {
  for (int64_t i = 0; i < rows.count; ++i) {
    if constexpr (std::is_same_v<T, double>) {
      body(i, static_cast<const double*>(rows.data) + i * rows.stride);
    } else if (rows.type == ScoreType::bf16) {
      body(i, static_cast<const at::BFloat16*>(rows.data) + i * rows.stride);
    } else if (rows.type == ScoreType::f16) {
      body(i, static_cast<const at::Half*>(rows.data) + i * rows.stride);
    } else {
      body(i, static_cast<const float*>(rows.data) + i * rows.stride);
    }
  }
}

template <typename T>
void widen(const Rows& rows, const double* scale, T* out) {
  over_rows<T>(rows, [&](int64_t i, const auto* x) {
    const T near = scale == nullptr ? T(1) : static_cast<T>(scale[i]);
    const Vec<T> high(near), low(scale == nullptr ? T(0) : static_cast<T>(scale[i] - near));
    over_row(x, rows.k, T(0), [&](int64_t j, const Vec<T>& values) {
      const int64_t left = rows.k - j;
      fused(values, low, values * high).store(out + i * rows.k + j, left < Vec<T>::size() ? left : Vec<T>::size());
    });
  });
}

template <typename T>
void inverse_norms(const Rows& rows, T* out) {
  over_rows<T>(rows, [&](int64_t i, const auto* x) {
    Vec<T> squares(T(0));
    over_row(x, rows.k, T(0), [&](int64_t, const Vec<T>& values) { squares = at::vec::fmadd(values, values, squares); });
    const T norm = std::sqrt(total(squares));
    out[i] = 1 / (norm < T(kLeastNorm) ? T(kLeastNorm) : norm);
  });
}

template <typename T>
void blank(const Tile<T>& tile, double temperature) {
  const int64_t end = (tile.columns + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
  for (int64_t i = 0; i < tile.rows; ++i) {
    for (int64_t j = tile.columns; j < end; ++j) {
      tile.y[i * tile.stride + j] = far_below<T>(temperature);
    }
  }
}

// Scales of whole vectors of columns, of which a vector of scales may have fewer.
template <typename T>
struct ColumnScales {
  explicit ColumnScales(const Tile<T>& tile) {
    for (int64_t j = 0; j < kTileColumns; ++j) {
      scales[j] = tile.column_scale != nullptr && j < tile.columns ? tile.column_scale[j] : T(1);
    }
  }
  alignas(64) T scales[kTileColumns];
};

// Calls step(j, y_ij of the vector at j) over row i.
template <typename T, typename Step>
inline void over_tile_row(const Tile<T>& tile, const ColumnScales<T>& columns, int64_t i, const Step& step) {
  const T* y = tile.y + i * tile.stride;
  if (tile.row_scale == nullptr) {
    for (int64_t j = 0; j < tile.columns; j += Vec<T>::size()) {
      step(j, Vec<T>::loadu(y + j));
    }
    return;
  }
  const Vec<T> scale(tile.row_scale[i]);
  for (int64_t j = 0; j < tile.columns; j += Vec<T>::size()) {
    step(j, Vec<T>::loadu(y + j) * scale * Vec<T>::loadu(columns.scales + j));
  }
}

template <typename T>
void tops(const Tile<T>& tile, double temperature, T* top) {
  const T sign(temperature < 0 ? -1 : 1);
  const ColumnScales<T> columns(tile);
  for (int64_t i = 0; i < tile.rows; ++i) {
    Vec<T> highest(sign * top[i]);
    over_tile_row(tile, columns, i, [&](int64_t, const Vec<T>& y) { highest = at_least(highest, y * Vec<T>(sign)); });
    top[i] = sign * widest(highest);
  }
}

template <typename T>
void sums(const Tile<T>& tile, double temperature, const T* top, double* row_sums, double* column_sums) {
  const Factor<T> factor(temperature);
  const ColumnScales<T> columns(tile);
  alignas(64) T below[kTileColumns] = {};
  for (int64_t i = 0; i < tile.rows; ++i) {
    const Vec<T> tops(top[i]);
    Vec<T> sum(T(0));
    over_tile_row(tile, columns, i, [&](int64_t j, const Vec<T>& y) {
      const Vec<T> e = power(factor.below(y, tops));
      sum = sum + e;
      (Vec<T>::loadu(below + j) + e).store(below + j);
    });
    row_sums[i] += total(sum);
  }
  if (column_sums != nullptr) {
    for (int64_t j = 0; j < tile.columns; ++j) {
      column_sums[j] += below[j];
    }
  }
}

// Two neighbouring vectors of a row of weights, as bfloat16.
inline void put_plain(const Vec<float>& one, const Vec<float>& other, c10::BFloat16* out) {
  at::vec::convert_from_float<at::BFloat16>(one, other).store(out);
}

inline uint32_t rounded_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return x != x ? bits : bits + 0x7fff + (bits >> 16 & 1);
}

// A vector of one row beside the same columns of the next, as bfloat16.
inline void put_interleaved(const Vec<float>& row, const Vec<float>& next, c10::BFloat16* out) {
  alignas(64) float one[Vec<float>::size()], other[Vec<float>::size()];
  alignas(64) uint32_t pairs[Vec<float>::size()];
  row.store(one);
  next.store(other);
  for (int64_t j = 0; j < Vec<float>::size(); ++j) {
    pairs[j] = rounded_bits(one[j]) >> 16 | (rounded_bits(other[j]) & 0xffff0000);
  }
  std::memcpy(static_cast<void*>(out), pairs, sizeof(pairs));
}

template <typename T>
void powers(const Tile<T>& tile, double temperature, const T* top, double* row_sums, const HalfTile& half) {
  const Factor<T> factor(temperature);
  const ColumnScales<T> columns(tile);
  for (int64_t i = 0; i < tile.rows; ++i) {
    const Vec<T> tops(top[i]);
    T* row = tile.y + i * tile.stride;
    Vec<T> sum(T(0));
    over_tile_row(tile, columns, i, [&](int64_t j, const Vec<T>& y) {
      const Vec<T> e = power(factor.below(y, tops));
      sum = sum + e;
      (e * Vec<T>::loadu(columns.scales + j)).store(row + j);
    });
    row_sums[i] += total(sum);
    if constexpr (std::is_same_v<T, float>) {
      if (half.plain != nullptr) {
        for (int64_t j = 0; j < tile.columns; j += 2 * Vec<T>::size()) {
          put_plain(Vec<T>::loadu(row + j), Vec<T>::loadu(row + j + Vec<T>::size()), half.plain + i * tile.stride + j);
        }
      }
    }
  }
}

// Weights of row i over y.
template <typename T, bool alike>
inline void pairs_of_row(const Tile<T>& tile, const Factor<T>& factor, const ColumnScales<T>& columns, const Softmax<T>& of_rows,
                         const Softmax<T>& of_columns, int64_t i) {
  const Vec<T> top(of_rows.top[i]), share(of_rows.share[i]);
  T* row = tile.y + i * tile.stride;
  over_tile_row(tile, columns, i, [&](int64_t j, const Vec<T>& y) {
    const Vec<T> e = power(factor.below(y, top)), other = Vec<T>::loadu(of_columns.share + j);
    if constexpr (alike) {
      (e * (share + other)).store(row + j);
    } else {
      fused(power(factor.below(y, Vec<T>::loadu(of_columns.top + j))), other, e * share).store(row + j);
    }
  });
}

void put_pairs(const Tile<float>& tile, const ColumnScales<float>& columns, int64_t i, const HalfTile& half) {
  constexpr int64_t lanes = Vec<float>::size();
  const bool paired = i + 1 < tile.rows;
  const float* rows[2] = {tile.y + i * tile.stride, tile.y + (i + 1) * tile.stride};
  const Vec<float> scales[2] = {Vec<float>(tile.row_scale == nullptr ? 1.f : tile.row_scale[i]),
                                Vec<float>(tile.row_scale == nullptr || !paired ? 1.f : tile.row_scale[i + 1])};
  for (int64_t j = 0; j < tile.columns; j += 2 * lanes) {
    Vec<float> g[2][2];
    for (int64_t r = 0; r < 2; ++r) {
      for (int64_t v = 0; v < 2; ++v) {
        g[r][v] = r == 0 || paired ? Vec<float>::loadu(rows[r] + j + v * lanes) : Vec<float>(0.f);
      }
      if (r == 0 || paired) {
        const Vec<float> one = Vec<float>::loadu(columns.scales + j), other = Vec<float>::loadu(columns.scales + j + lanes);
        put_plain(g[r][0] * one, g[r][1] * other, half.plain + (i + r) * tile.stride + j);
      }
    }
    if (half.interleaved != nullptr) {
      for (int64_t v = 0; v < 2; ++v) {
        put_interleaved(g[0][v] * scales[0], g[1][v] * scales[1], half.interleaved + i * tile.stride + 2 * (j + v * lanes));
      }
    }
  }
}

template <typename T>
void pairs(const Tile<T>& tile, double temperature, const Softmax<T>& of_rows, const Softmax<T>& of_columns, bool alike, const HalfTile& half) {
  const Factor<T> factor(temperature);
  const ColumnScales<T> columns(tile);
  alignas(64) T top[kTileColumns] = {}, share[kTileColumns] = {};
  for (int64_t j = 0; j < tile.columns; ++j) {
    top[j] = of_columns.top[j];
    share[j] = of_columns.share[j];
  }
  const Softmax<T> whole_vectors{top, share};
  for (int64_t i = 0; i < tile.rows; ++i) {
    if (alike) {
      pairs_of_row<T, true>(tile, factor, columns, of_rows, whole_vectors, i);
    } else {
      pairs_of_row<T, false>(tile, factor, columns, of_rows, whole_vectors, i);
    }
    if constexpr (std::is_same_v<T, float>) {
      if (half.plain != nullptr && (i % 2 == 1 || i + 1 == tile.rows)) {
        put_pairs(tile, columns, i / 2 * 2, half);
      }
    }
  }
}

}  // namespace

extern const TileKernelSet tile_kernels = {
    {transpose<float>, widen<float>, inverse_norms<float>, blank<float>, tops<float>, sums<float>, powers<float>, pairs<float>},
    {transpose<double>, widen<double>, inverse_norms<double>, blank<double>, tops<double>, sums<double>, powers<double>, pairs<double>}};

}  // namespace CPU_CAPABILITY
}  // namespace fuseer
