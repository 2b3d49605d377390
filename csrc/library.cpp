// Which ops does fuseer.kernels._C implement, and how was it built? The schemas are in kernels/<op>/op.py, which works without this file.
#include "instruction_set.h"
#include "library.h"

#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fuseer {

at::Tensor all_reduce(const at::Tensor& tensor, const char* reduction, const std::string& group_name) {
  if (group_name.empty()) {
    return tensor;
  }
  // Boxed: the C++ type of group_name differs between torch versions, a string fits all of them.
  torch::jit::Stack stack{tensor, std::string(reduction), group_name};
  c10::Dispatcher& dispatcher = c10::Dispatcher::singleton();
  dispatcher.findSchemaOrThrow("_c10d_functional::all_reduce", "").callBoxed(&stack);
  dispatcher.findSchemaOrThrow("_c10d_functional::wait_tensor", "").callBoxed(&stack);
  return stack.back().toTensor();
}

at::Tensor result(at::IntArrayRef sizes, at::ScalarType type) {
  at::Tensor out = at::empty(sizes, type);
#if defined(__linux__)
  constexpr uintptr_t page = 4096, huge = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(out.const_data_ptr()), first = (begin + page - 1) / page * page;
  if (out.nbytes() >= 4 * huge) {
    madvise(reinterpret_cast<void*>(first), (begin + out.nbytes() - first) / page * page, MADV_HUGEPAGE);
  }
#endif
  return out;
}

InstructionSet instruction_set() {
  static const InstructionSet found = [] {
    const std::string capability = at::get_cpu_capability();
    return capability == "AVX512" ? InstructionSet::avx512 : capability == "AVX2" ? InstructionSet::avx2 : InstructionSet::base;
  }();
  return found;
}

ScoreType score_type(const at::Tensor& scores, const char* op) {
  switch (scores.scalar_type()) {
    case at::kFloat:
      return ScoreType::f32;
    case at::kBFloat16:
      return ScoreType::bf16;
    case at::kHalf:
      return ScoreType::f16;
    case at::kDouble:
      return ScoreType::f64;
    default:
      TORCH_CHECK_TYPE(false, op, ": backend cpu takes float16, bfloat16, float32 or float64; got ", scores.scalar_type());
  }
}

at::Tensor rows_in_one_piece(const at::Tensor& x) {
  return x.size(-1) > 1 && x.stride(-1) != 1 ? x.contiguous() : x;
}

void check_ids(const char* op, const char* name, const at::Tensor& ids, int64_t bound) {
  if (ids.numel() == 0) {
    return;
  }
  const int64_t* first = ids.const_data_ptr<int64_t>();
  const auto [low, high] = std::minmax_element(first, first + ids.numel());
  TORCH_CHECK_VALUE(*low >= 0 && *high < bound, op, ": ", name, " must be in 0..", bound - 1, "; got ", *low, "..", *high);
}

}  // namespace fuseer

TORCH_LIBRARY_IMPL(fuseer, CPU, m) {
  m.impl("sinkhorn.cpu", [](const at::Tensor& scores, double epsilon, int64_t iterations, std::string group_name) {
    return fuseer::sinkhorn_cpu(scores, epsilon, iterations, group_name);
  });
  m.impl("swapped_prediction.cpu",
         [](at::TensorList scores, at::TensorList queue_scores, at::IntArrayRef assign, double epsilon, int64_t iterations,
            double temperature, std::string group_name) {
           return fuseer::swapped_prediction_cpu(scores, queue_scores, assign, epsilon, iterations, temperature, group_name);
         });
  m.impl("swapped_prediction_backward.cpu", fuseer::swapped_prediction_backward_cpu);
  m.impl("soft_xent.cpu", fuseer::soft_xent_cpu);
  m.impl("soft_xent_backward.cpu", fuseer::soft_xent_backward_cpu);
  m.impl("masked_patch_mse.cpu", [](const at::Tensor& pred, const at::Tensor& images, const at::Tensor& ids_masked, int64_t patch,
                                    bool normalize, std::string reduction) {
    return fuseer::masked_patch_mse_cpu(pred, images, ids_masked, patch, normalize, reduction);
  });
  m.impl("masked_patch_mse_backward.cpu",
         [](const at::Tensor& dloss, const at::Tensor& pred, const at::Tensor& images, const at::Tensor& ids_masked,
            const at::Tensor& statistics, int64_t patch, bool normalize, std::string reduction) {
           return fuseer::masked_patch_mse_backward_cpu(dloss, pred, images, ids_masked, statistics, patch, normalize, reduction);
         });
  m.impl("gather_patches.cpu", fuseer::gather_patches_cpu);
  m.impl("gather_patches_backward.cpu", fuseer::gather_patches_backward_cpu);
  m.impl("patch_embed_visible.cpu", fuseer::patch_embed_visible_cpu);
  m.impl("patch_embed_visible_backward.cpu", fuseer::patch_embed_visible_backward_cpu);
  m.impl("patch_mask.cpu", fuseer::patch_mask_cpu);
  m.impl("gather_tokens.cpu", fuseer::gather_tokens_cpu);
  m.impl("gather_tokens_backward.cpu", fuseer::gather_tokens_backward_cpu);
  m.impl("unshuffle_tokens.cpu", fuseer::unshuffle_tokens_cpu);
  m.impl("unshuffle_tokens_backward.cpu", fuseer::unshuffle_tokens_backward_cpu);
  m.impl("nt_xent_statistics", fuseer::nt_xent_statistics_cpu);
  m.impl("nt_xent_gradient", fuseer::nt_xent_gradient_cpu);
  m.impl("nt_xent_alone", fuseer::nt_xent_alone_cpu);
  m.impl("info_nce_sums", fuseer::info_nce_sums_cpu);
  m.impl("augment_pixels", fuseer::augment_pixels_cpu);
  m.impl("ema_update_.cpu", fuseer::ema_update_cpu);
  m.impl("lars_update_.cpu", fuseer::lars_update_cpu);
}

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] = FUSEER_COMPILER " " __VERSION__;
    info["flags"] = FUSEER_FLAGS;
    info["instruction_sets"] = FUSEER_INSTRUCTION_SETS;
    info["cpu_capability"] = at::get_cpu_capability();
    info["torch"] = FUSEER_TORCH;
    return info;
  }, "How this library was built (compiler, flags, torch, instruction sets) and the CPU it runs on.");
}
