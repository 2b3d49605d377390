// How are rows of tokens added and copied by vectors? Compiled once per instruction set.
#include "../simd.h"
#include "unshuffle_tokens_cpu.h"

namespace fuseer {
namespace CPU_CAPABILITY {
namespace {

inline int64_t chunk_at(int64_t begin, int64_t k) {
  return k - begin < kChunk ? k - begin : kChunk;
}

template <typename scalar_t>
void add_as(const AnyRow& x, const Acc<scalar_t>* addend, int64_t k, bool stream, void* out) {
  using T = Acc<scalar_t>;
  alignas(64) T sum[kChunk + 2 * kLanes];
  for (int64_t begin = 0; begin < k; begin += kChunk) {
    const int64_t count = chunk_at(begin, k);
    over_row(static_cast<const scalar_t*>(x.data) + begin, count, T(0),
             [&](int64_t j, const Vec<T>& values) { (values + Vec<T>::loadu(addend + begin + j)).store(sum + j); });
    put(static_cast<scalar_t*>(out) + begin, sum, count, stream);
  }
  fence_streams();
}

void add_of_float(const AnyRow& x, const float* addend, int64_t k, bool stream, void* out) {
  FUSEER_OF_FLOAT(x.type, add_as, x, addend, k, stream, out)
}

template <typename T>
void accumulate(const AnyRow& x, int64_t k, double* sums) {
  alignas(64) T values[kChunk];
  for (int64_t begin = 0; begin < k; begin += kChunk) {
    const int64_t count = chunk_at(begin, k);
    widen(x, begin, count, T(0), values);
    for (int64_t j = 0; j < count; ++j) {
      sums[begin + j] += static_cast<double>(values[j]);
    }
  }
}

void copy(void* out, const void* x, int64_t bytes, bool stream) {
  put_bytes(out, x, bytes, stream);
  fence_streams();
}

}  // namespace

extern const UnshuffleTokensKernelSet unshuffle_tokens_kernels = {{add_of_float, accumulate<float>}, {add_as<double>, accumulate<double>}, copy};

}  // namespace CPU_CAPABILITY
}  // namespace fuseer
