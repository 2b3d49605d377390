// Which C++ functions implement fuseer::<op>, and what do they share?
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace fuseer {

// `tensor` reduced ("sum" or "max") over the group of that name, as torch.distributed registered it; itself where the name is "".
at::Tensor all_reduce(const at::Tensor& tensor, const char* reduction, const std::string& group_name);

at::Tensor sinkhorn_cpu(const at::Tensor& scores, double epsilon, int64_t iterations, const std::string& group_name);

}  // namespace fuseer
