// How do fuseer::masked_patch_mse and its gradient run on the CPU? Patch by patch, each thread its own run of patches.
#include "masked_patch_mse_cpu.h"

#include "../library.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <memory>
#include <numeric>
#include <vector>

namespace fuseer {
namespace {

constexpr int64_t kAhead = 2;

template <typename T>
const MaskedPatchMseKernels<T>& kernels() {
  return of_type<T>(FUSEER_CHOSEN_KERNELS(masked_patch_mse_kernels));
}

// Predictions and images where they lie, and which belong together.
struct Patches {
  Patches(const at::Tensor& pred, const at::Tensor& images, const at::Tensor& ids_masked, int64_t side)
      : rows(rows_in_one_piece(pred)),
        images(images),
        ids_tensor(ids_masked.contiguous()),
        ids(ids_tensor.const_data_ptr<int64_t>()),
        row_type(score_type(pred, "masked_patch_mse")),
        pixel_type(score_type(images, "masked_patch_mse")),
        side(side),
        across(images.size(3) / side),
        every(across * (images.size(2) / side)),
        n(side * side * images.size(1)),
        by_id(pred.size(1) == every) {
    check_ids("masked_patch_mse", "ids_masked", ids_tensor, every);
  }
  int64_t count() const { return images.size(0); }
  int64_t masked() const { return ids_tensor.size(1); }
  int64_t grain() const { return 1 + kThreadScores / n; }
  PatchPixels pixels(int64_t b, int64_t id) const {
    const int64_t y = id / across * side, x = id % across * side;
    const int64_t first = b * images.stride(0) + y * images.stride(2) + x * images.stride(3);
    const char* data = static_cast<const char*>(images.const_data_ptr()) + first * bytes_of(pixel_type);
    return {data, pixel_type, side, images.size(1), images.stride(2), images.stride(3), images.stride(1), images.size(3) - x - side};
  }
  // row r of pred, counted through its images
  AnyRow pred(int64_t r) const {
    const int64_t b = r / rows.size(1), offset = b * rows.stride(0) + r % rows.size(1) * rows.stride(1);
    return {static_cast<const char*>(rows.const_data_ptr()) + offset * bytes_of(row_type), row_type};
  }
  at::Tensor rows, images, ids_tensor;
  const int64_t* ids;
  ScoreType row_type, pixel_type;
  int64_t side, across, every, n;
  bool by_id;
};

template <typename T>
std::tuple<at::Tensor, at::Tensor> forward(const Patches& patches, bool normalize, bool mean) {
  const int64_t M = patches.masked(), all = patches.ids_tensor.numel();
  const at::ScalarType type = c10::CppTypeToScalarType<T>::value;
  at::Tensor losses = at::empty(patches.ids_tensor.sizes(), type), statistics = at::empty({patches.count(), M, 2}, type);
  T* loss = losses.mutable_data_ptr<T>();
  auto* of_patch = reinterpret_cast<PatchStatistics<T>*>(statistics.mutable_data_ptr<T>());
  at::parallel_for(0, all, patches.grain(), [&](int64_t begin, int64_t end) {
    std::unique_ptr<T[]> pixels(new T[patch_buffer(patches.n)]);
    for (int64_t i = begin; i < end; ++i) {
      if (i + kAhead < end) {
        kernels<T>().fetch(patches.pixels((i + kAhead) / M, patches.ids[i + kAhead]));
      }
      const int64_t b = i / M, id = patches.ids[i], row = patches.by_id ? b * patches.every + id : i;
      loss[i] = static_cast<T>(kernels<T>().forward(patches.pixels(b, id), patches.pred(row), normalize, pixels.get(), &of_patch[i]));
    }
  });
  if (!mean) {
    return {losses, statistics};
  }
  const double total = std::accumulate(loss, loss + all, 0.0);
  at::Tensor out = at::empty({}, type);
  *out.mutable_data_ptr<T>() = static_cast<T>(total / all);
  return {out, statistics};
}

// What each row of pred is compared with: the last of ids_masked that points at it, or -1, and the sum of their losses' gradients.
template <typename T>
struct Compared {
  Compared(const Patches& patches, const at::Tensor& dloss, bool mean)
      : from(patches.rows.size(0) * patches.rows.size(1), -1), weight(from.size(), 0.0) {
    const int64_t M = patches.masked(), all = patches.ids_tensor.numel();
    const at::Tensor incoming = dloss.contiguous();
    const T* of_loss = incoming.const_data_ptr<T>();
    for (int64_t i = 0; i < all; ++i) {
      const int64_t row = patches.by_id ? i / M * patches.every + patches.ids[i] : i;
      from[row] = i;
      weight[row] += 2.0 * (mean ? static_cast<double>(of_loss[0]) / all : of_loss[i]) / patches.n;
    }
  }
  std::vector<int64_t> from;
  std::vector<double> weight;
};

template <typename T>
at::Tensor backward(const Patches& patches, const at::Tensor& dloss, const at::Tensor& statistics, bool mean) {
  at::Tensor dpred = result(patches.rows.sizes(), patches.rows.scalar_type());
  char* out = static_cast<char*>(dpred.mutable_data_ptr());
  const bool stream = static_cast<int64_t>(dpred.nbytes()) > kStreamedBytes;
  const int64_t bytes = patches.n * dpred.element_size();
  const auto* of_patch = reinterpret_cast<const PatchStatistics<T>*>(statistics.const_data_ptr<T>());
  const Compared<T> compared(patches, dloss, mean);
  at::parallel_for(0, compared.from.size(), patches.grain(), [&](int64_t begin, int64_t end) {
    std::unique_ptr<T[]> pixels(new T[patch_buffer(patches.n)]);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t i = compared.from[row], next = row + kAhead < end ? compared.from[row + kAhead] : -1;
      if (next >= 0) {
        kernels<T>().fetch(patches.pixels(next / patches.masked(), patches.ids[next]));
      }
      if (i < 0) {
        kernels<T>().put_zeros(out + row * bytes, bytes, stream);
        continue;
      }
      const PatchPixels patch = patches.pixels(i / patches.masked(), patches.ids[i]);
      kernels<T>().backward(patch, patches.pred(row), of_patch[i], compared.weight[row], stream, pixels.get(), out + row * bytes);
    }
  });
  return dpred;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> masked_patch_mse_cpu(const at::Tensor& pred, const at::Tensor& images, const at::Tensor& ids_masked,
                                                        int64_t patch, bool normalize, const std::string& reduction) {
  const Patches patches(pred, images, ids_masked, patch);
  const bool mean = reduction == "mean";
  return patches.row_type == ScoreType::f64 ? forward<double>(patches, normalize, mean) : forward<float>(patches, normalize, mean);
}

at::Tensor masked_patch_mse_backward_cpu(const at::Tensor& dloss, const at::Tensor& pred, const at::Tensor& images, const at::Tensor& ids_masked,
                                         const at::Tensor& statistics, int64_t patch, bool /*normalize*/, const std::string& reduction) {
  const Patches patches(pred, images, ids_masked, patch);
  const at::Tensor kept = statistics.contiguous();
  const bool mean = reduction == "mean";
  return patches.row_type == ScoreType::f64 ? backward<double>(patches, dloss, kept, mean) : backward<float>(patches, dloss, kept, mean);
}

}  // namespace fuseer
