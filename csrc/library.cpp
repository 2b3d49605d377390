// Which ops does fuseer.kernels._C implement, and how was it built? The schemas are in kernels/<op>/op.py, which works without this file.
#include "instruction_set.h"
#include "library.h"

#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

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
  m.impl("nt_xent_statistics", fuseer::nt_xent_statistics_cpu);
  m.impl("nt_xent_gradient", fuseer::nt_xent_gradient_cpu);
  m.impl("nt_xent_alone", fuseer::nt_xent_alone_cpu);
  m.impl("info_nce_sums", fuseer::info_nce_sums_cpu);
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
