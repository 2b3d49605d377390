// Which C++ functions implement fuseer::<op>, and what do they share?
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace fuseer {

// `tensor` reduced ("sum" or "max") over the group of that name, as torch.distributed registered it; itself where the name is "".
at::Tensor all_reduce(const at::Tensor& tensor, const char* reduction, const std::string& group_name);

// Uninitialised memory for a result; a large one asks for huge pages, without which every 4 KiB of it cost a page fault when written.
at::Tensor result(at::IntArrayRef sizes, at::ScalarType type);

at::Tensor sinkhorn_cpu(const at::Tensor& scores, double epsilon, int64_t iterations, const std::string& group_name);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> swapped_prediction_cpu(const at::Tensor& scores,
                                                                                  const std::optional<at::Tensor>& queue_scores,
                                                                                  at::IntArrayRef assign, double epsilon, int64_t iterations,
                                                                                  double temperature, const std::string& group_name);
at::Tensor swapped_prediction_backward_cpu(const at::Tensor& dloss, const at::Tensor& scores, const at::Tensor& potentials,
                                           const at::Tensor& statistics, const at::Tensor& scale, at::IntArrayRef assign, double epsilon,
                                           double temperature);

std::tuple<at::Tensor, at::Tensor> soft_xent_cpu(const at::Tensor& logits, const at::Tensor& target, double temperature,
                                                 const std::optional<at::Tensor>& weights, const std::optional<at::Tensor>& target_center,
                                                 std::optional<double> target_temperature);
at::Tensor soft_xent_backward_cpu(const at::Tensor& dloss, const at::Tensor& logits, const at::Tensor& target, const at::Tensor& statistics,
                                  double temperature, const std::optional<at::Tensor>& weights, const std::optional<at::Tensor>& target_center,
                                  std::optional<double> target_temperature);

}  // namespace fuseer
