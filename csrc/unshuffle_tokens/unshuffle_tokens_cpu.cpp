// How do fuseer::unshuffle_tokens and its gradients run on the CPU? Row by row into their places, each thread its own images or positions.
#include "unshuffle_tokens_cpu.h"

#include "../library.h"

#include <ATen/Parallel.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

namespace fuseer {
namespace {

constexpr const char* kOp = "unshuffle_tokens";

const UnshuffleTokensKernelSet& kernels() {
  return FUSEER_CHOSEN_KERNELS(unshuffle_tokens_kernels);
}

// Dense ids of which each row is a permutation: otherwise a row of the gradient would be written twice, and another never.
at::Tensor permutations(const at::Tensor& ids) {
  const at::Tensor given = ids.contiguous();
  const int64_t B = given.size(0), P = given.size(1);
  check_ids(kOp, "ids_restore", given, P);
  const int64_t* id = given.const_data_ptr<int64_t>();
  std::vector<int64_t> seen(P, -1);
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t i = 0; i < P; ++i) {
      TORCH_CHECK_VALUE(std::exchange(seen[id[b * P + i]], b) != b, kOp, ": ids_restore must hold each of 0..", P - 1,
                        " once in every row; a row repeats one");
    }
  }
  return given;
}

int64_t rows_a_thread(int64_t D) {
  return 1 + kThreadScores / std::max<int64_t>(1, D);
}

// Rows of D numbers of T, each filled up to whole vectors.
template <typename T>
struct PaddedRows {
  explicit PaddedRows(const at::Tensor& x) : stride(padded(x.size(1))), numbers(x.size(0) * stride, T(0)) {
    const at::Tensor dense = x.to(c10::CppTypeToScalarType<T>::value).contiguous();
    for (int64_t i = 0; i < x.size(0); ++i) {
      std::copy_n(dense.const_data_ptr<T>() + i * x.size(1), x.size(1), &numbers[i * stride]);
    }
  }
  int64_t stride;
  std::vector<T> numbers;
};

template <typename T>
at::Tensor forward(const at::Tensor& x, const at::Tensor& given, const at::Tensor& mask_token, const std::optional<at::Tensor>& pos_embed) {
  const at::Tensor tokens = rows_in_one_piece(x);
  const int64_t B = given.size(0), P = given.size(1), D = x.size(2), keep = x.size(1), bytes = D * x.element_size();
  const at::ScalarType type = c10::CppTypeToScalarType<T>::value;
  // what masked places hold is the same in every image
  const at::Tensor token = mask_token.to(type), at_places = pos_embed.has_value() ? at::add(pos_embed->to(type), token) : token.unsqueeze(0);
  const at::Tensor masked = at_places.to(x.scalar_type()).contiguous();
  const PaddedRows<T> positions(pos_embed.has_value() ? *pos_embed : mask_token.unsqueeze(0));
  at::Tensor out = result({B, P, D}, x.scalar_type());
  const bool stream = static_cast<int64_t>(out.nbytes()) > kStreamedBytes;
  const char* from = static_cast<const char*>(tokens.const_data_ptr());
  const char* hidden = static_cast<const char*>(masked.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t* rank = given.const_data_ptr<int64_t>();
  const ScoreType score = score_type(x, kOp);
  at::parallel_for(0, B * P, rows_a_thread(D), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t i = row % P, b = row / P;
      const char* kept = from + (b * tokens.stride(0) + rank[row] * tokens.stride(1)) * x.element_size();
      if (rank[row] >= keep) {
        kernels().copy(to + row * bytes, hidden + (pos_embed.has_value() ? i * bytes : 0), bytes, stream);
      } else if (!pos_embed.has_value()) {
        kernels().copy(to + row * bytes, kept, bytes, stream);
      } else {
        of_type<T>(kernels()).add({kept, score}, &positions.numbers[i * positions.stride], D, stream, to + row * bytes);
      }
    }
  });
  return out;
}

// Position by position, so that the sums over images need nobody else's: dx by copies, sums of masked and, where wanted, of visible rows.
template <typename T>
void backward(const at::Tensor& dout, const at::Tensor& given, int64_t keep, at::Tensor& dx, double* masked, double* visible) {
  const at::Tensor rows = rows_in_one_piece(dout);
  const int64_t B = given.size(0), P = given.size(1), D = dout.size(2), item = dout.element_size();
  const char* from = static_cast<const char*>(rows.const_data_ptr());
  char* to = static_cast<char*>(dx.mutable_data_ptr());
  const int64_t* rank = given.const_data_ptr<int64_t>();
  const ScoreType score = score_type(dout, kOp);
  at::parallel_for(0, P, 1 + kThreadScores / std::max<int64_t>(1, B * D), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t b = 0; b < B; ++b) {
        const int64_t r = rank[b * P + i];
        const AnyRow row{from + (b * rows.stride(0) + i * rows.stride(1)) * item, score};
        double* sums = r < keep ? visible : masked;
        if (r < keep) {
          std::memcpy(to + (b * keep + r) * D * item, row.data, D * item);
        }
        if (sums != nullptr) {
          of_type<T>(kernels()).accumulate(row, D, sums + i * D);
        }
      }
    }
  });
}

}  // namespace

at::Tensor unshuffle_tokens_cpu(const at::Tensor& x, const at::Tensor& ids_restore, const at::Tensor& mask_token,
                                const std::optional<at::Tensor>& pos_embed) {
  const at::Tensor given = permutations(ids_restore);
  return x.scalar_type() == at::kDouble ? forward<double>(x, given, mask_token, pos_embed) : forward<float>(x, given, mask_token, pos_embed);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> unshuffle_tokens_backward_cpu(const at::Tensor& dout, const at::Tensor& ids_restore,
                                                                             int64_t keep, at::ScalarType mask_token_dtype,
                                                                             std::optional<at::ScalarType> pos_embed_dtype) {
  const at::Tensor given = permutations(ids_restore);
  const int64_t B = dout.size(0), P = dout.size(1), D = dout.size(2);
  at::Tensor dx = result({B, keep, D}, dout.scalar_type()), masked = at::zeros({P, D}, at::kDouble);
  const bool positions = pos_embed_dtype.has_value();
  at::Tensor visible = positions ? at::zeros({P, D}, at::kDouble) : at::empty({0}, at::kDouble);
  const auto run = dout.scalar_type() == at::kDouble ? backward<double> : backward<float>;
  run(dout, given, keep, dx, masked.mutable_data_ptr<double>(), positions ? visible.mutable_data_ptr<double>() : nullptr);
  const at::Tensor dpos_embed = positions ? at::add(masked, visible).to(*pos_embed_dtype) : at::empty({0}, mask_token_dtype);
  return {dx, masked.sum(0).to(mask_token_dtype), dpos_embed};
}

}  // namespace fuseer
