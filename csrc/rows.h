// How are rows of scores, and lists of tensors, described to the code of one instruction set?
#pragma once

#include <cstdint>

namespace fuseer {

enum class ScoreType { f32, bf16, f16, f64 };

// `count` rows of `k` scores, `stride` scores apart; the scores of a row are neighbours.
struct Rows {
  const void* data;
  ScoreType type;
  int64_t count;
  int64_t stride;
  int64_t k;
};

// A row of k neighbours of any type.
struct AnyRow {
  const void* data;
  ScoreType type;
};

constexpr int64_t bytes_of(ScoreType type) {
  return type == ScoreType::f64 ? 8 : type == ScoreType::f32 ? 4 : 2;
}

// Neighbours of any type that may be written.
struct Flat {
  char* data;
  ScoreType type;
};

// The tensors at one place of three lists: element j of one belongs to element j of all. No data: there is no such list.
struct Place {
  Flat target, source, other;
  int64_t numel;
};

constexpr int64_t kLanes = 16;    // floats of the widest vector register
constexpr int64_t kChunk = 2048;  // columns whose sum stays in float32 before it joins a float64 sum; an output chunk stays in L1
constexpr int64_t padded(int64_t k) {
  return (k + kLanes - 1) / kLanes * kLanes;
}

constexpr double kPowersPerNat = 1.4426950408889634074;  // log2(e)

// The potential of columns beyond k: a power of two of it is 0, and unlike -infinity it can be subtracted from itself.
template <typename T>
constexpr T kAbsent = T(-1e30);

constexpr int64_t kThreadScores = 16384;  // fewer are done before a second thread has woken

// Whole cache lines of an output of so many bytes go past the caches: it would not survive in them anyway.
constexpr int64_t kStreamedBytes = 16 << 20;

}  // namespace fuseer
