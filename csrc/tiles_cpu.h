// How do tiles of a matrix of similarities come about on the CPU, for losses that never keep the whole of it?
#pragma once

#include "instruction_set.h"
#include "rows.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>

#include <vector>

namespace fuseer {

// A tile of similarities y_ij = <a_i, b_j> row_scale_i column_scale_j, written over as it is used. The memory holds what stands before the
// scales (null: all 1); rows lie `stride` apart, a multiple of 2 kLanes; what lies beyond `columns` is scratch.
template <typename T>
struct Tile {
  T* y;
  int64_t rows, columns, stride;
  const T* row_scale;
  const T* column_scale;
};

// Probabilities of a row or a column: p = e^((y - top) / temperature) share; a share of 1 / (sum of all) makes them sum to 1.
template <typename T>
struct Softmax {
  const T* top;
  const T* share;
};

// Where a tile of weights goes as bfloat16: as it lies, or with pairs of its rows interleaved, which is how the second operand of a
// bfloat16 product lies. Row i, or the pair it leads, begins i strides of the tile in; an odd last row is paired with zeros.
struct HalfTile {
  c10::BFloat16* plain;
  c10::BFloat16* interleaved;
};

// A similarity, before its scales, that no exponential sees: with the sign opposite to the temperature's, and finite, for what it is
// multiplied by may have either sign.
constexpr double kFarBelow = 1e24;

template <typename T>
struct TileKernels {
  // out[j, i] <- x[i, j] of [rows, columns]
  void (*transpose)(const T* x, int64_t stride, int64_t rows, int64_t columns, T* out, int64_t out_stride);
  // out [count, k] <- rows of any type, row i times scale_i where scales are given
  void (*widen)(const Rows&, const double* scale, T* out);
  // 1 / max(|row|, 1e-12)
  void (*inverse_norms)(const Rows&, T* out);
  // y beyond the columns <- what no exponential of this temperature sees, up to the next whole vectors
  void (*blank)(const Tile<T>&, double temperature);
  // top_i <- the larger of top_i / temperature and every y_ij / temperature, times temperature
  void (*tops)(const Tile<T>&, double temperature, T* top);
  // row_sums_i += sum_j e_ij and, unless null, column_sums_j += sum_i e_ij, with e_ij = e^((y_ij - top_i) / temperature)
  void (*sums)(const Tile<T>&, double temperature, const T* top, double* row_sums, double* column_sums);
  // the same row sums; y_ij <- e_ij column_scale_j, or as bfloat16 in half.plain
  void (*powers)(const Tile<T>&, double temperature, const T* top, double* row_sums, const HalfTile& half);
  // y_ij <- p_ij of the row + p_ij of the column; as bfloat16: times column_scale_j in half.plain, times row_scale_i in half.interleaved.
  // `alike`: all tops are the same number.
  void (*pairs)(const Tile<T>&, double temperature, const Softmax<T>& of_rows, const Softmax<T>& of_columns, bool alike, const HalfTile& half);
};

struct TileKernelSet {
  TileKernels<float> of_float;
  TileKernels<double> of_double;
};

FUSEER_DECLARE_KERNELS(TileKernelSet, tile_kernels)

template <typename T>
const TileKernels<T>& tiles() {
  return of_type<T>(FUSEER_CHOSEN_KERNELS(tile_kernels));
}

// c[m, n] <- a[m, k] b[k, n] (+ c with `add`), row-major, on the calling thread; sums of kSummed products, then sums of those. Of bfloat16, b has pairs of its rows interleaved, k is
// even, and products are summed in float32; only where multiplies_bfloat16().
void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride,
              bool add);
void multiply(int64_t m, int64_t n, int64_t k, const double* a, int64_t a_stride, const double* b, int64_t b_stride, double* c,
              int64_t c_stride, bool add);
void multiply(int64_t m, int64_t n, int64_t k, const c10::BFloat16* a, int64_t a_stride, const c10::BFloat16* b, int64_t b_stride, float* c,
              int64_t c_stride, bool add);

// Whether this CPU and this torch multiply bfloat16 that way, found out by multiplying.
bool multiplies_bfloat16();

// <x, y> of n neighbours.
double dot(const double* x, const double* y, int64_t n);

// out [rows / 2, columns, 2] <- pairs of rows of x interleaved; an odd last row is paired with zeros.
void interleave(const c10::BFloat16* x, int64_t stride, int64_t rows, int64_t columns, c10::BFloat16* out);

constexpr int64_t kSummed = 64;

constexpr double kLeastNorm = 1e-12;  // as in torch.nn.functional.normalize

// 1 / max(|row|, 1e-12) of every row of [M, D], in double; 1 where `normalize` is false. Numbers of a row are neighbours.
std::vector<double> inverse_norms(const at::Tensor& rows, bool normalize);

// <x_i, y_j> of two tensors of one type, in double. Numbers of a row are neighbours.
double dot(const at::Tensor& x, int64_t i, const at::Tensor& y, int64_t j);

// Whether rows with such inverse norms can be multiplied as they are and scaled afterwards: no product overflows, none is lost.
bool can_be_scaled_later(const std::vector<double>& inverses);

// Whether e^((y - 1) / temperature) of every cosine y is an ordinary float: then no maximum is needed.
bool cosines_need_no_maximum(double temperature);

// Frees what matrix products in bfloat16 leave behind on a thread.
struct ReleasedProducts {
  ~ReleasedProducts();
};

// log(e^a + s) - a for the positive's logit a and the sum s of the others', both relative to the same number.
double excess(double s, double a);

// d <- inverse (d - z <z, d>), the gradient through the normalisation z = x inverse; no projection where 1e-12 stood in for the norm.
void through_normalisation(const std::vector<double>& z, double inverse, std::vector<double>& d);

}  // namespace fuseer
