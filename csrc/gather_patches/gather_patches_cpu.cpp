// How do fuseer::gather_patches and its gradient run on the CPU? Patch by patch, each written once.
#include "../library.h"
#include "../patches.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>

namespace fuseer {
namespace {

constexpr const char* kOp = "gather_patches";

// row [p, p, C] = the patch that begins at x
template <typename T>
void copy(const Patches& from, const T* x, T* row) {
  const int64_t p = from.p, C = from.channels;
  const bool dense = from.of_channel == 1 && from.of_pixel == C;
  for (int64_t y = 0; y < p; ++y, row += p * C) {
    const T* line = x + y * from.of_line;
    if (dense) {
      std::copy_n(line, p * C, row);
      continue;
    }
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t i = 0; i < p; ++i) {
        row[i * C + c] = line[c * from.of_channel + i * from.of_pixel];
      }
    }
  }
}

// The patch that begins at x = row [p, p, C]
template <typename T, typename Acc>
void spread(const Patches& into, const Acc* row, T* x) {
  const int64_t p = into.p, C = into.channels;
  for (int64_t y = 0; y < p; ++y, row += p * C) {
    for (int64_t c = 0; c < C; ++c) {
      T* line = x + y * into.of_line + c * into.of_channel;
      for (int64_t i = 0; i < p; ++i) {
        line[i * into.of_pixel] = static_cast<T>(row[i * C + c]);
      }
    }
  }
}

}  // namespace

at::Tensor gather_patches_cpu(const at::Tensor& images, const at::Tensor& ids, int64_t patch) {
  const Patches from(images, patch);
  const std::vector<int64_t> id = patch_ids(kOp, "ids", ids, from.count);
  const int64_t M = ids.size(1), n = from.numbers();
  at::Tensor out = result({ids.size(0), M, n}, images.scalar_type());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, images.scalar_type(), kOp, [&] {
    const scalar_t* x = images.const_data_ptr<scalar_t>();
    scalar_t* rows = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, static_cast<int64_t>(id.size()), from.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        copy(from, x + from.offset(r / M, id[r]), rows + r * n);
      }
    });
  });
  return out;
}

at::Tensor gather_patches_backward_cpu(const at::Tensor& dout, const at::Tensor& images, const at::Tensor& ids, int64_t patch) {
  at::Tensor dimages = result(images.sizes(), images.scalar_type());
  const Patches into(dimages, patch);
  std::vector<int64_t> id = patch_ids(kOp, "ids", ids, into.count);
  const int64_t B = ids.size(0), M = ids.size(1), n = into.numbers();
  for (size_t r = 0; r < id.size(); ++r) {
    id[r] += static_cast<int64_t>(r) / M * into.count;
  }
  const ByKey takers(id, B * into.count);
  const at::Tensor incoming = dout.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, images.scalar_type(), kOp, [&] {
    using Acc = at::opmath_type<scalar_t>;
    const scalar_t* rows = incoming.const_data_ptr<scalar_t>();
    scalar_t* x = dimages.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, B * into.count, into.grain(), [&](int64_t begin, int64_t end) {
      std::unique_ptr<Acc[]> sum(new Acc[n]);
      for (int64_t patch = begin; patch < end; ++patch) {
        scalar_t* place = x + into.offset(patch / into.count, patch % into.count);
        const int64_t first = takers.begin[patch], last = takers.begin[patch + 1];
        if (last - first == 1) {
          spread(into, rows + takers.places[first] * n, place);
          continue;
        }
        std::fill_n(sum.get(), n, Acc(0));
        for (int64_t taker = first; taker < last; ++taker) {
          const scalar_t* row = rows + takers.places[taker] * n;
          for (int64_t j = 0; j < n; ++j) {
            sum[j] += static_cast<Acc>(row[j]);
          }
        }
        spread(into, sum.get(), place);
      }
    });
  });
  return dimages;
}

}  // namespace fuseer
