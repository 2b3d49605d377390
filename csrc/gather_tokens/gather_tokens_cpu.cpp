// How do fuseer::gather_tokens and its gradient run on the CPU? Rows are copied; rows that went to several places are summed in order.
#include "../library.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace fuseer {
namespace {

constexpr int32_t kNowhere = -1;

// Of every image, where each token went: its first place, and from every place the next one of the same token.
struct Places {
  Places(const at::Tensor& ids, int64_t patches) : first(ids.size(0) * patches, kNowhere), next(ids.numel()) {
    const int64_t B = ids.size(0), M = ids.size(1);
    const int64_t* given = ids.const_data_ptr<int64_t>();
    at::parallel_for(0, B, 1 + kThreadScores / std::max<int64_t>(1, M), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t m = M - 1; m >= 0; --m) {
          int32_t& place = first[b * patches + given[b * M + m]];
          next[b * M + m] = place;
          place = static_cast<int32_t>(m);
        }
      }
    });
  }
  std::vector<int32_t> first, next;
};

int64_t rows_a_thread(int64_t D) {
  return 1 + kThreadScores / std::max<int64_t>(1, D);
}

}  // namespace

at::Tensor gather_tokens_cpu(const at::Tensor& x, const at::Tensor& ids) {
  const at::Tensor tokens = rows_in_one_piece(x), given = ids.contiguous();
  const int64_t B = given.size(0), M = given.size(1), D = x.size(2), item = x.element_size();
  check_ids("gather_tokens", "ids", given, x.size(1));
  at::Tensor out = result({B, M, D}, x.scalar_type());
  const char* from = static_cast<const char*>(tokens.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t* id = given.const_data_ptr<int64_t>();
  at::parallel_for(0, B * M, rows_a_thread(D), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      std::memcpy(to + row * D * item, from + (row / M * tokens.stride(0) + id[row] * tokens.stride(1)) * item, D * item);
    }
  });
  return out;
}

at::Tensor gather_tokens_backward_cpu(const at::Tensor& dout, const at::Tensor& ids, int64_t patches) {
  const at::Tensor rows = rows_in_one_piece(dout), given = ids.contiguous();
  const int64_t B = given.size(0), M = given.size(1), D = dout.size(2);
  check_ids("gather_tokens", "ids", given, patches);
  const Places places(given, patches);
  at::Tensor dx = result({B, patches, D}, dout.scalar_type());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dout.scalar_type(), "gather_tokens", [&] {
    using T = at::opmath_type<scalar_t>;
    const scalar_t* from = rows.const_data_ptr<scalar_t>();
    scalar_t* to = dx.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, B * patches, rows_a_thread(D), [&](int64_t begin, int64_t end) {
      std::vector<T> sum(D);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t b = row / patches;
        const auto at = [&](int32_t m) { return from + b * rows.stride(0) + m * rows.stride(1); };
        const auto after = [&](int32_t m) { return places.next[b * M + m]; };
        int32_t m = places.first[row];
        if (m == kNowhere) {
          std::memset(to + row * D, 0, D * sizeof(scalar_t));
        } else if (after(m) == kNowhere) {
          std::memcpy(to + row * D, at(m), D * sizeof(scalar_t));
        } else {
          std::copy_n(at(m), D, sum.begin());
          while ((m = after(m)) != kNowhere) {
            const scalar_t* summand = at(m);
            for (int64_t d = 0; d < D; ++d) {
              sum[d] += static_cast<T>(summand[d]);
            }
          }
          std::copy_n(sum.begin(), D, to + row * D);
        }
      }
    });
  });
  return dx;
}

}  // namespace fuseer
