// Which C++ functions implement fuseer::<op>, and what do they share?
#pragma once

#include "rows.h"

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace fuseer {

// `tensor` reduced ("sum" or "max") over the group of that name, as torch.distributed registered it; itself where the name is "".
at::Tensor all_reduce(const at::Tensor& tensor, const char* reduction, const std::string& group_name);

// Uninitialised memory for a result; a large one asks for huge pages, without which every 4 KiB of it cost a page fault when written.
at::Tensor result(at::IntArrayRef sizes, at::ScalarType type);

// The type of a tensor of scores or features for backend cpu, which takes float16, bfloat16, float32 and float64.
ScoreType score_type(const at::Tensor& scores, const char* op);

// `x` with the numbers of a row side by side.
at::Tensor rows_in_one_piece(const at::Tensor& x);

// Refuses an id outside 0..bound-1; the ids are int64 and dense.
void check_ids(const char* op, const char* name, const at::Tensor& ids, int64_t bound);

at::Tensor sinkhorn_cpu(const at::Tensor& scores, double epsilon, int64_t iterations, const std::string& group_name);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> swapped_prediction_cpu(at::TensorList scores, at::TensorList queue_scores,
                                                                                  at::IntArrayRef assign, double epsilon, int64_t iterations,
                                                                                  double temperature, const std::string& group_name);
at::Tensor swapped_prediction_backward_cpu(const at::Tensor& dloss, at::TensorList scores, const at::Tensor& potentials,
                                           const at::Tensor& statistics, const at::Tensor& scale, at::IntArrayRef assign, double epsilon,
                                           double temperature);

std::tuple<at::Tensor, at::Tensor> soft_xent_cpu(const at::Tensor& logits, const at::Tensor& target, double temperature,
                                                 const std::optional<at::Tensor>& weights, const std::optional<at::Tensor>& target_center,
                                                 std::optional<double> target_temperature);
at::Tensor soft_xent_backward_cpu(const at::Tensor& dloss, const at::Tensor& logits, const at::Tensor& target, const at::Tensor& statistics,
                                  double temperature, const std::optional<at::Tensor>& weights, const std::optional<at::Tensor>& target_center,
                                  std::optional<double> target_temperature);

std::tuple<at::Tensor, at::Tensor> masked_patch_mse_cpu(const at::Tensor& pred, const at::Tensor& images, const at::Tensor& ids_masked,
                                                        int64_t patch, bool normalize, const std::string& reduction);
at::Tensor masked_patch_mse_backward_cpu(const at::Tensor& dloss, const at::Tensor& pred, const at::Tensor& images,
                                         const at::Tensor& ids_masked, const at::Tensor& statistics, int64_t patch, bool normalize,
                                         const std::string& reduction);

at::Tensor gather_patches_cpu(const at::Tensor& images, const at::Tensor& ids, int64_t patch);
at::Tensor gather_patches_backward_cpu(const at::Tensor& dout, const at::Tensor& images, const at::Tensor& ids, int64_t patch);

at::Tensor patch_embed_visible_cpu(const at::Tensor& images, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                   const at::Tensor& ids_keep, const std::optional<at::Tensor>& pos_embed,
                                   const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& std);
// The gradients of weight, bias and pos_embed; without numbers where there is no bias or pos_embed.
std::tuple<at::Tensor, at::Tensor, at::Tensor> patch_embed_visible_backward_cpu(
    const at::Tensor& dout, const at::Tensor& images, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& ids_keep, const std::optional<at::Tensor>& pos_embed, const std::optional<at::Tensor>& mean,
    const std::optional<at::Tensor>& std);

std::tuple<at::Tensor, at::Tensor, at::Tensor> patch_mask_cpu(const at::Tensor& noise, int64_t keep);

at::Tensor gather_tokens_cpu(const at::Tensor& x, const at::Tensor& ids);
at::Tensor gather_tokens_backward_cpu(const at::Tensor& dout, const at::Tensor& ids, int64_t patches);

at::Tensor unshuffle_tokens_cpu(const at::Tensor& x, const at::Tensor& ids_restore, const at::Tensor& mask_token,
                                const std::optional<at::Tensor>& pos_embed);
// (dx, dmask_token, dpos_embed), the last without numbers where it has no dtype
std::tuple<at::Tensor, at::Tensor, at::Tensor> unshuffle_tokens_backward_cpu(const at::Tensor& dout, const at::Tensor& ids_restore,
                                                                             int64_t keep, at::ScalarType mask_token_dtype,
                                                                             std::optional<at::ScalarType> pos_embed_dtype);

// (the sum of the losses of own rows, their statistics [count, 3]: top and sum, which ranks exchange, and the share of all but the positive)
std::tuple<double, at::Tensor> nt_xent_statistics_cpu(const at::Tensor& rows, int64_t begin, int64_t count, double temperature, bool normalize);
// scale * the gradient of the sum of all losses to own rows [count, D]; top and sum of all rows lead the rows of `of_all`
at::Tensor nt_xent_gradient_cpu(const at::Tensor& rows, const at::Tensor& of_all, const at::Tensor& of_own, int64_t begin, int64_t count,
                                double temperature, bool normalize, double scale);
// Both, of rows that are all own ones.
std::tuple<double, at::Tensor> nt_xent_alone_cpu(const at::Tensor& rows, double temperature, bool normalize, double scale);

// (the sum of the losses, its gradient to the query)
std::tuple<double, at::Tensor> info_nce_sums_cpu(const at::Tensor& query, const at::Tensor& keys, const std::optional<at::Tensor>& positive,
                                                 const std::optional<at::Tensor>& positive_index, double temperature, bool normalize,
                                                 bool gradient);

// Flip, jitter, grey, blur, solarization and normalisation of uint8 views [B, 3, h, w] -> out, float32; see engine/data/pixels.py.
void augment_pixels_cpu(const at::Tensor& pixels, const at::Tensor& steps, const at::Tensor& factors, const at::Tensor& taps,
                        const at::Tensor& radii, const at::Tensor& scale, const at::Tensor& out);

void ema_update_cpu(at::TensorList teacher, at::TensorList student, double momentum, const std::optional<at::Tensor>& momentum_scalar,
                    at::TensorList shadow);

void lars_update_cpu(at::TensorList params, at::TensorList grads, at::TensorList momenta, double lr, double momentum, double weight_decay,
                     double trust_coefficient, double eps, std::string denominator, c10::List<bool> adapt, bool lr_in_momentum,
                     bool nesterov, bool clip, const std::optional<at::Tensor>& skip, const std::optional<at::Tensor>& segments,
                     std::string group_name);

}  // namespace fuseer
