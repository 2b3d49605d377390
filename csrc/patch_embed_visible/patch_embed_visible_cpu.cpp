// How do fuseer::patch_embed_visible and its gradient run on the CPU? Visible patches become the rows of one matrix, and that a product.
#include "../library.h"
#include "../patches.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

namespace fuseer {
namespace {

constexpr const char* kOp = "patch_embed_visible";
// rows of patches that lie in memory at once: 24 MB of a ViT-B's in float32, in which a product of 64 images at 75 % is one
constexpr int64_t kRows = 8192;

// The type in which patches of this weight are multiplied: torch has no fast product of float16.
at::ScalarType product_type(const at::Tensor& weight) {
  return weight.scalar_type() == at::kHalf ? at::kFloat : weight.scalar_type();
}

at::ScalarType sum_type(const at::Tensor& weight) {
  return weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The visible patches of images, as rows (c, y, x) of the type in which they are multiplied.
class Visible {
 public:
  Visible(const at::Tensor& images, const at::Tensor& weight, const at::Tensor& ids_keep, const std::optional<at::Tensor>& mean,
          const std::optional<at::Tensor>& std)
      : images_(images),
        weight_(weight),
        from_(images, weight.size(3)),
        ids_(patch_ids(kOp, "ids_keep", ids_keep, from_.count)),
        keep_(ids_keep.size(1)) {
    if (images.scalar_type() == at::kByte) {
      mean_ = mean->to(sum_type(weight)).contiguous();
      std_ = std->to(sum_type(weight)).contiguous();
    }
  }
  int64_t rows() const { return static_cast<int64_t>(ids_.size()); }
  int64_t width() const { return from_.numbers(); }
  int64_t positions() const { return from_.count; }
  const std::vector<int64_t>& ids() const { return ids_; }

  // Calls use(begin, matrix) of at most kRows rows at a time; `matrix` is theirs until it returns.
  template <typename Use>
  void in_parts(const Use& use) const {
    at::Tensor packed = result({std::min(rows(), kRows), width()}, product_type(weight_));
    for (int64_t begin = 0; begin < rows(); begin += kRows) {
      const at::Tensor part = packed.narrow(0, 0, std::min(kRows, rows() - begin));
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weight_.scalar_type(), kOp, [&] { pack<scalar_t>(begin, part); });
      use(begin, part);
    }
  }

 private:
  template <typename Weight>
  void pack(int64_t begin, const at::Tensor& part) const {
    using Product = std::conditional_t<std::is_same_v<Weight, at::Half>, float, Weight>;
    if (images_.scalar_type() == at::kByte) {
      const std::vector<Product> values = normalised<Product>();
      fill<uint8_t, Product>(begin, part, [&](int64_t c, uint8_t u) { return values[256 * c + u]; });
      return;
    }
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, images_.scalar_type(), kOp, [&] {
      fill<scalar_t, Product>(begin, part, [](int64_t, scalar_t x) { return static_cast<Product>(static_cast<Weight>(x)); });
    });
  }

  // (u/255 - mean)/std of all 256 values in every channel, [C, 256].
  template <typename Product>
  std::vector<Product> normalised() const {
    using Sum = at::opmath_type<Product>;
    std::vector<Product> values(256 * from_.channels);
    for (int64_t c = 0; c < from_.channels; ++c) {
      for (int64_t u = 0; u < 256; ++u) {
        values[256 * c + u] = static_cast<Product>((Sum(u) / 255 - mean_.const_data_ptr<Sum>()[c]) / std_.const_data_ptr<Sum>()[c]);
      }
    }
    return values;
  }

  template <typename Pixel, typename Product, typename Change>
  void fill(int64_t first, const at::Tensor& part, const Change& change) const {
    const Pixel* images = images_.const_data_ptr<Pixel>();
    Product* rows = part.mutable_data_ptr<Product>();
    const int64_t p = from_.p;
    at::parallel_for(0, part.size(0), from_.grain(), [&](int64_t begin, int64_t end) {
      Product* to = rows + begin * width();
      for (int64_t r = first + begin; r < first + end; ++r) {
        const Pixel* patch = images + from_.offset(r / keep_, ids_[r]);
        for (int64_t c = 0; c < from_.channels; ++c) {
          for (int64_t y = 0; y < p; ++y, to += p) {
            const Pixel* line = patch + c * from_.of_channel + y * from_.of_line;
            // side by side is worth a loop of its own: the compiler copies it in vectors
            if (from_.of_pixel == 1) {
              for (int64_t x = 0; x < p; ++x) {
                to[x] = change(c, line[x]);
              }
            } else {
              for (int64_t x = 0; x < p; ++x) {
                to[x] = change(c, line[x * from_.of_pixel]);
              }
            }
          }
        }
      }
    });
  }

  const at::Tensor images_, weight_;
  const Patches from_;
  const std::vector<int64_t> ids_;
  const int64_t keep_;
  at::Tensor mean_, std_;
};

// weight [D, C p p] in the type of the product
at::Tensor as_matrix(const at::Tensor& weight) {
  return weight.reshape({weight.size(0), -1}).to(product_type(weight)).contiguous();
}

// out[r] = product[r] + added[ids[r]], or + added[0] where there is only that
template <typename Out, typename Product, typename Sum>
void finish(const Product* product, const at::Tensor& added, const int64_t* ids, int64_t rows, Out* out) {
  const int64_t D = added.size(1);
  const Sum* every = added.const_data_ptr<Sum>();
  const bool one = added.size(0) == 1;
  at::parallel_for(0, rows, 1 + 16384 / D, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Sum* more = every + (one ? 0 : ids[r] * D);
      for (int64_t d = 0; d < D; ++d) {
        out[r * D + d] = static_cast<Out>(static_cast<Sum>(product[r * D + d]) + more[d]);
      }
    }
  });
}

// bias + pos_embed [P, D], or whichever there is; undefined where there is neither.
at::Tensor added(const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& pos_embed, at::ScalarType type) {
  at::Tensor sum;
  if (bias.has_value()) {
    sum = bias->to(type).unsqueeze(0);
  }
  if (pos_embed.has_value()) {
    const at::Tensor positions = pos_embed->to(type);
    sum = sum.defined() ? at::add(positions, sum) : positions;
  }
  return sum.defined() ? sum.contiguous() : sum;
}

// sums [P, D] of the rows [R, D] that each id has, in their order
template <typename Row, typename Sum>
void sum_by_id(const at::Tensor& rows, const ByKey& places, const at::Tensor& sums) {
  const int64_t P = sums.size(0), D = sums.size(1);
  const Row* from = rows.const_data_ptr<Row>();
  Sum* into = sums.mutable_data_ptr<Sum>();
  at::parallel_for(0, P, 1, [&](int64_t begin, int64_t end) {
    for (int64_t id = begin; id < end; ++id) {
      Sum* sum = into + id * D;
      std::fill_n(sum, D, Sum(0));
      for (int64_t place = places.begin[id]; place < places.begin[id + 1]; ++place) {
        const Row* row = from + places.places[place] * D;
        for (int64_t d = 0; d < D; ++d) {
          sum[d] += static_cast<Sum>(row[d]);
        }
      }
    }
  });
}

}  // namespace

at::Tensor patch_embed_visible_cpu(const at::Tensor& images, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                   const at::Tensor& ids_keep, const std::optional<at::Tensor>& pos_embed,
                                   const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& std) {
  const Visible visible(images, weight, ids_keep, mean, std);
  const int64_t D = weight.size(0);
  const at::Tensor matrix = as_matrix(weight).t(), more = added(bias, pos_embed, sum_type(weight));
  const at::ScalarType type = pos_embed.has_value() ? c10::promoteTypes(weight.scalar_type(), pos_embed->scalar_type()) : weight.scalar_type();
  at::Tensor out = result({ids_keep.size(0), ids_keep.size(1), D}, type);
  const at::Tensor rows = out.view({-1, D});
  visible.in_parts([&](int64_t begin, const at::Tensor& part) {
    at::Tensor into = rows.narrow(0, begin, part.size(0));
    at::Tensor product = type == part.scalar_type() ? into : result({part.size(0), D}, part.scalar_type());
    at::mm_out(product, part, matrix);
    if (!more.defined()) {
      if (!product.is_same(into)) {
        into.copy_(product);
      }
      return;
    }
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, kOp, [&] {
      using Out = scalar_t;
      AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, product.scalar_type(), kOp, [&] {
        finish<Out, scalar_t, at::opmath_type<scalar_t>>(product.const_data_ptr<scalar_t>(), more, visible.ids().data() + begin,
                                                         part.size(0), into.mutable_data_ptr<Out>());
      });
    });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> patch_embed_visible_backward_cpu(
    const at::Tensor& dout, const at::Tensor& images, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& ids_keep, const std::optional<at::Tensor>& pos_embed, const std::optional<at::Tensor>& mean,
    const std::optional<at::Tensor>& std) {
  const Visible visible(images, weight, ids_keep, mean, std);
  const int64_t D = weight.size(0);
  const at::ScalarType sum = sum_type(weight);
  const at::Tensor rows = dout.reshape({-1, D}).contiguous();
  at::Tensor dweight = at::zeros({D, visible.width()}, sum);
  visible.in_parts([&](int64_t begin, const at::Tensor& part) {
    const at::Tensor own = rows.narrow(0, begin, part.size(0)).to(part.scalar_type()).t();
    if (part.scalar_type() == sum) {
      dweight.addmm_(own, part);
    } else {
      dweight.add_(at::mm(own, part));
    }
  });
  at::Tensor dbias = at::empty({0}, weight.scalar_type()), dpositions = at::empty({0}, weight.scalar_type());
  if (bias.has_value()) {
    dbias = at::sum(rows, {0}, false, sum).to(bias->scalar_type());
  }
  if (pos_embed.has_value()) {
    const at::Tensor sums = at::empty({visible.positions(), D}, sum);
    const ByKey places(visible.ids(), visible.positions());
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows.scalar_type(), kOp, [&] {
      if (sum == at::kDouble) {
        sum_by_id<scalar_t, double>(rows, places, sums);
      } else {
        sum_by_id<scalar_t, float>(rows, places, sums);
      }
    });
    dpositions = sums.to(pos_embed->scalar_type());
  }
  return {dweight.view(weight.sizes()).to(weight.scalar_type()), dbias, dpositions};
}

}  // namespace fuseer
