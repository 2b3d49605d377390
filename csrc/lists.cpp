// Which tensors of a list can be walked as they lie?
#include "lists.h"

#include "library.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>

namespace fuseer {
namespace {

// Whether elements of two dense tensors of one shape come in the same order; strides of axes of length 1 say nothing.
bool lie_alike(const at::Tensor& x, const at::Tensor& y) {
  return x.strides().equals(y.strides()) || (x.is_contiguous() && y.is_contiguous());
}

}  // namespace

Places::Places(const char* op, at::TensorList target, at::TensorList source, at::TensorList other) {
  all.reserve(target.size());
  const auto flat = [op](const at::Tensor& x) { return Flat{static_cast<char*>(const_cast<void*>(x.const_data_ptr())), score_type(x, op)}; };
  for (size_t i = 0; i < target.size(); ++i) {
    const at::Tensor& first = target[i];
    // the first tensor's own order where it has no gaps, else that of a copy without gaps
    const at::Tensor base = first.is_non_overlapping_and_dense() ? first : laid_out(first, at::empty_like(first, at::MemoryFormat::Contiguous), true);
    const at::Tensor read = laid_out(source[i], base, false);
    const Flat third = other.empty() ? Flat{nullptr, ScoreType::f32} : flat(laid_out(other[i], base, true));
    all.push_back({flat(base), flat(read), third, first.numel()});
  }
}

at::Tensor Places::laid_out(const at::Tensor& x, const at::Tensor& like, bool written) {
  if (lie_alike(x, like)) {
    return x;
  }
  at::Tensor copy = at::empty_strided(like.sizes(), like.strides(), x.options());
  copy.copy_(x);
  held_.push_back(copy);
  if (written) {
    written_.emplace_back(x, copy);
  }
  return copy;
}

void Places::write_back() const {
  for (const auto& [tensor, copy] : written_) {
    tensor.copy_(copy);
  }
}

}  // namespace fuseer
