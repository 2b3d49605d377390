// How do the vectors of one instruction set read and write lists of tensors of any types? For csrc/**/*_simd.cpp alone, like simd.h.
#pragma once

#include "simd.h"

namespace fuseer {
namespace CPU_CAPABILITY {
namespace {

// out[0 : count] <- values[0 : count], rounded to the type of `out`; see put.
template <typename T>
inline void put_as(const Flat& out, int64_t begin, const T* values, int64_t count, bool stream) {
  with_type({out.data, out.type}, [=](const auto* typed) {
    using scalar_t = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    scalar_t* to = const_cast<scalar_t*>(typed) + begin;
    if constexpr (std::is_same_v<Acc<scalar_t>, T>) {
      put(to, values, count, stream);
    } else {
      for (int64_t j = 0; j < count; ++j) {
        to[j] = static_cast<scalar_t>(values[j]);
      }
    }
  });
}

template <typename T>
constexpr ScoreType kTypeOf = std::is_same_v<T, float> ? ScoreType::f32 : ScoreType::f64;

// Where elements begin, begin + 1, ... are readable as T up to whole vectors: where they lie, or widened into `buffer`.
template <typename T>
inline const T* values_at(const Flat& x, int64_t begin, int64_t count, T* buffer) {
  if (x.type == kTypeOf<T> && count % (2 * kLanes) == 0) {
    return reinterpret_cast<const T*>(x.data) + begin;
  }
  widen({x.data, x.type}, begin, count, T(0), buffer);
  return buffer;
}

// Where they may be written as T, likewise; if that is in `buffer`, put_as brings them home.
template <typename T>
inline T* written_at(const Flat& x, int64_t begin, int64_t count, T* buffer) {
  return x.type == kTypeOf<T> && count % (2 * kLanes) == 0 ? reinterpret_cast<T*>(x.data) + begin : buffer;
}

// step(begin, count) over blocks that stay in the first cache.
template <typename Step>
inline void over_blocks(int64_t begin, int64_t end, const Step& step) {
  for (; begin < end; begin += kChunk) {
    step(begin, end - begin < kChunk ? end - begin : kChunk);
  }
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace fuseer
