// What does lars_update_ run on a GPU?
#include "../launch.cuh"
#include "../tensor_lists.cuh"

namespace fuseer {
namespace {

constexpr int warp = 32, warps = threads / warp, squares = 3;

// The numbers of lars_update_ (kernels/lars_update_/op.py).
struct Options {
  double lr, momentum, weight_decay, trust_coefficient, eps;
  bool norm_of_sum, lr_in_momentum, nesterov, clip;
};

// Whether the device's flag, `size` bytes of whatever type, differs from 0; the sign bit of a floating-point flag is not in `mask`.
struct Flag {
  const uint8_t* bytes;
  int size;
  uint64_t mask;

  __device__ bool raised() const {
    uint64_t bits = 0;
    for (int i = 0; i < size; ++i) {
      bits |= static_cast<uint64_t>(bytes[i]) << (8 * i);
    }
    return (bits & mask) != 0;
  }
};

// The sums over the block, in thread 0, in an order of its own. `shared` is free after the next barrier.
__device__ inline void sum_over_block(double (&sums)[squares], double (&shared)[warps][squares]) {
#pragma unroll
  for (int offset = warp / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int k = 0; k < squares; ++k) {
      sums[k] += __shfl_down_sync(0xffffffffu, sums[k], offset);
    }
  }
  if (threadIdx.x % warp == 0) {
#pragma unroll
    for (int k = 0; k < squares; ++k) {
      shared[threadIdx.x / warp][k] = sums[k];
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < warps; ++w) {
#pragma unroll
      for (int k = 0; k < squares; ++k) {
        sums[k] += shared[w][k];
      }
    }
  }
}

// Adds those of rows begin to end - 1 that are this thread's.
__device__ inline void add_rows(double (&sums)[squares], const double* rows, int64_t begin, int64_t end) {
  for (int64_t i = begin + threadIdx.x; i < end; i += threads) {
#pragma unroll
    for (int k = 0; k < squares; ++k) {
      sums[k] += rows[i * squares + k];
    }
  }
}

// w^2, g^2, (g + decay w)^2: eight of each are summed in Real, everything beyond in float64.
template <typename Real>
__device__ inline void add_squares(double (&sums)[squares], const Row& row, const Place& place, double weight_decay) {
  const Real decay = static_cast<Real>(weight_decay);
  Real w[share], g[share], of_share[squares] = {};
  load(w, row, 0, place);
  load(g, row, 1, place);
#pragma unroll
  for (int e = 0; e < share; ++e) {
    const Real both = g[e] + decay * w[e];
    of_share[0] += w[e] * w[e];
    of_share[1] += g[e] * g[e];
    of_share[2] += both * both;
  }
#pragma unroll
  for (int k = 0; k < squares; ++k) {
    sums[k] += of_share[k];
  }
}

// The first launch: each program's sums to its row of `partials` [programs, 3]; no layer that is not adapted needs them. Rows are
// (param, gradient, momentum).
__global__ void __launch_bounds__(threads, 4) lars_squares(Lists lists, double weight_decay, double* partials) {
  __shared__ double shared[warps][squares];
  const Row row = lists.row();
  double sums[squares] = {};
  if (row.adapted) {
    for_each_block(row, [&](const Place& place) {
      if (row.kind_of(0) == f64) {
        add_squares<double>(sums, row, place, weight_decay);
      } else {
        add_squares<float>(sums, row, place, weight_decay);
      }
    });
  }
  sum_over_block(sums, shared);
  if (threadIdx.x == 0) {
    for (int k = 0; k < squares; ++k) {
      partials[static_cast<int64_t>(blockIdx.x) * squares + k] = sums[k];
    }
  }
}

// Between the two where layers lie on several ranks: layer blockIdx.x's partial sums, zeros where it has none here, to its row of
// `sums` [layers, 3].
__global__ void __launch_bounds__(threads) lars_merge(const int64_t* layers, const double* partials, double* sums) {
  __shared__ double shared[warps][squares];
  const int64_t layer = blockIdx.x;
  double own[squares] = {};
  add_rows(own, partials, layers[layer], layers[layer + 1]);
  sum_over_block(own, shared);
  if (threadIdx.x == 0) {
    for (int k = 0; k < squares; ++k) {
      sums[layer * squares + k] = own[k];
    }
  }
}

// How a layer's elements move: d = ratio (g + decay w).
struct Step {
  double ratio;
  double decay;

  __device__ static Step of(const double (&sums)[squares], const Options& options) {
    const double w = sqrt(sums[0]), g = sqrt(sums[1]), both = sqrt(sums[2]), other = options.norm_of_sum ? both : g;
    // A NaN is no norm either.
    if (!(w > 0 && other > 0)) {
      return {1.0, options.norm_of_sum ? options.weight_decay : 0.0};
    }
    const double below = options.norm_of_sum ? both : g + options.weight_decay * w;
    double ratio = options.trust_coefficient * w / (below + options.eps);
    if (options.clip) {
      ratio /= options.lr;
      ratio = ratio > 1 ? 1.0 : ratio;
    }
    return {ratio, options.weight_decay};
  }
};

template <typename Real>
__device__ inline void update(const Row& row, const Place& place, const Step& step, const Options& options) {
  const Real ratio = static_cast<Real>(step.ratio), decay = static_cast<Real>(step.decay);
  const Real lr = static_cast<Real>(options.lr), momentum = static_cast<Real>(options.momentum);
  Real w[share], g[share], m[share];
  load(w, row, 0, place);
  load(g, row, 1, place);
  load(m, row, 2, place);
#pragma unroll
  for (int e = 0; e < share; ++e) {
    Real d = (g[e] + decay * w[e]) * ratio;
    d = options.lr_in_momentum ? lr * d : d;
    m[e] = momentum * m[e] + d;
    const Real moved = options.nesterov ? d + momentum * m[e] : m[e];
    w[e] -= options.lr_in_momentum ? moved : lr * moved;
  }
  store(row, 2, m, place);
  store(row, 0, w, place);
}

// The second launch. A layer's sums are its row of `sums`, or where that is null the rows of `partials` from layers[l] on.
__global__ void __launch_bounds__(threads, 3)
    lars_update(Lists lists, Options options, const int64_t* layers, const double* partials, const double* sums, Flag skip) {
  __shared__ double shared[warps][squares];
  __shared__ Step of_layer;
  if (skip.raised()) {
    return;
  }
  const Row row = lists.row();
  Step step = {1.0, options.weight_decay};
  if (row.adapted) {
    double own[squares] = {};
    if (sums != nullptr) {
      add_rows(own, sums, row.layer, row.layer + 1);
    } else {
      add_rows(own, partials, layers[row.layer], layers[row.layer + 1]);
    }
    sum_over_block(own, shared);
    if (threadIdx.x == 0) {
      of_layer = Step::of(own, options);
    }
    __syncthreads();
    step = of_layer;
  }
  for_each_block(row, [&](const Place& place) {
    if (row.kind_of(0) == f64) {
      update<double>(row, place, step, options);
    } else {
      update<float>(row, place, step, options);
    }
  });
}

}  // namespace
}  // namespace fuseer

// Each returns a cudaError_t. partials: [programs, 3]; sums: [layers, 3], null for a process alone.
extern "C" int fuseer_lars_squares(const void* rows, const int32_t* owners, int64_t programs, double weight_decay, double* partials,
                                   void* stream) {
  using namespace fuseer;
  return launch(lars_squares, programs, stream, Lists{static_cast<const Row*>(rows), owners}, weight_decay, partials);
}

extern "C" int fuseer_lars_merge(const int64_t* layers, int64_t count, const double* partials, double* sums, void* stream) {
  using namespace fuseer;
  return launch(lars_merge, count, stream, layers, partials, sums);
}

// skip: a flag on the device, `skip_size` bytes of which those in `skip_mask` make it differ from 0; or null.
extern "C" int fuseer_lars_update(const void* rows, const int32_t* owners, int64_t programs, const int64_t* layers,
                                  const double* partials, const double* sums, const uint8_t* skip, int64_t skip_size, int64_t skip_mask,
                                  double lr, double momentum, double weight_decay, double trust_coefficient, double eps,
                                  int64_t norm_of_sum, int64_t lr_in_momentum, int64_t nesterov, int64_t clip, void* stream) {
  using namespace fuseer;
  const Flag flag{skip, skip == nullptr ? 0 : static_cast<int>(skip_size), static_cast<uint64_t>(skip_mask)};
  const Options options{lr, momentum, weight_decay, trust_coefficient, eps, norm_of_sum != 0, lr_in_momentum != 0, nesterov != 0, clip != 0};
  return launch(lars_update, programs, stream, Lists{static_cast<const Row*>(rows), owners}, options, layers, partials, sums, flag);
}
