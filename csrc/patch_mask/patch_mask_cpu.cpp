// How does fuseer::patch_mask run on the CPU? Each row is sorted byte by byte, which keeps equal numbers in order; each thread has rows of its own.
#include "../library.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <bit>
#include <type_traits>
#include <utility>
#include <vector>

namespace fuseer {
namespace {

// Unsigned numbers in the order of floating ones: -0 is 0, and NaN comes after infinity.
template <typename T>
auto key_of(T x) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  constexpr Bits sign = Bits(1) << (8 * sizeof(Bits) - 1);
  const Bits bits = std::bit_cast<Bits>(x + T(0));
  return x != x ? ~Bits(0) : bits & sign ? ~bits : bits | sign;
}

// A row's numbers with their places.
template <typename T>
class Row {
 public:
  using Bits = decltype(key_of(T()));
  explicit Row(int64_t patches) : entries_(patches), other_(patches) {}

  template <typename scalar_t>
  void take(const scalar_t* noise, int64_t stride) {
    for (auto& digits : counts_) {
      digits.fill(0);
    }
    for (size_t i = 0; i < entries_.size(); ++i) {
      const Bits key = key_of(static_cast<T>(noise[i * stride]));
      entries_[i] = {key, static_cast<int32_t>(i)};
      for (size_t d = 0; d < sizeof(Bits); ++d) {
        ++counts_[d][digit(key, d)];
      }
    }
  }
  // Stable, one pass for every byte in which the row's numbers differ.
  void sort() {
    for (size_t d = 0; d < sizeof(Bits); ++d) {
      auto& places = counts_[d];
      if (entries_.empty() || places[digit(entries_[0].key, d)] == static_cast<int32_t>(entries_.size())) {
        continue;
      }
      int32_t place = 0;
      for (int32_t& count : places) {
        place += std::exchange(count, place);
      }
      for (const Entry& entry : entries_) {
        other_[places[digit(entry.key, d)]++] = entry;
      }
      entries_.swap(other_);
    }
  }
  int32_t patch(int64_t rank) const { return entries_[rank].patch; }

 private:
  struct Entry {
    Bits key;
    int32_t patch;
  };
  static size_t digit(Bits key, size_t d) { return key >> (8 * d) & 255; }
  std::vector<Entry> entries_, other_;
  std::array<std::array<int32_t, 256>, sizeof(Bits)> counts_;
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> patch_mask_cpu(const at::Tensor& noise, int64_t keep) {
  const int64_t B = noise.size(0), P = noise.size(1);
  at::Tensor ids_keep = at::empty({B, keep}, at::kLong), ids_restore = at::empty({B, P}, at::kLong), mask = at::empty({B, P}, at::kFloat);
  int64_t *kept = ids_keep.mutable_data_ptr<int64_t>(), *restore = ids_restore.mutable_data_ptr<int64_t>();
  float* removed = mask.mutable_data_ptr<float>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, noise.scalar_type(), "patch_mask", [&] {
    const scalar_t* rows = noise.const_data_ptr<scalar_t>();
    at::parallel_for(0, B, 1 + kThreadScores / std::max<int64_t>(1, P), [&](int64_t begin, int64_t end) {
      Row<std::conditional_t<std::is_same_v<scalar_t, double>, double, float>> row(P);
      for (int64_t b = begin; b < end; ++b) {
        row.take(rows + b * noise.stride(0), noise.stride(1));
        row.sort();
        for (int64_t rank = 0; rank < P; ++rank) {
          restore[b * P + row.patch(rank)] = rank;
          removed[b * P + row.patch(rank)] = rank < keep ? 0.f : 1.f;
        }
        for (int64_t rank = 0; rank < keep; ++rank) {
          kept[b * keep + rank] = row.patch(rank);
        }
      }
    });
  });
  return {ids_keep, ids_restore, mask};
}

}  // namespace fuseer
