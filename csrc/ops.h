// The operators, for C++ callers: each goes through the dispatcher, so that autograd, autocast, vmap and fake tensors apply.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

namespace kl_ext::ops {

at::Tensor kl_div_single_loss(const at::Tensor& mu, const at::Tensor& log_var, double clamp_min, double clamp_max,
                              std::optional<at::ScalarType> dtype);

std::tuple<at::Tensor, at::Tensor> kl_div_single_loss_backward(const at::Tensor& grad_output, const at::Tensor& mu,
                                                               const at::Tensor& log_var, double clamp_min, double clamp_max,
                                                               std::array<bool, 2> output_mask);

// The gradients that are given are overwritten, the others not computed: so for every <operator>_backward.out.
void kl_div_single_loss_backward_out(const at::Tensor& grad_output, const at::Tensor& mu, const at::Tensor& log_var,
                                     double clamp_min, double clamp_max, const std::optional<at::Tensor>& grad_mu,
                                     const std::optional<at::Tensor>& grad_log_var);

at::Tensor kl_div_pair_loss(const at::Tensor& mu_p, const at::Tensor& log_var_p, const at::Tensor& mu_q,
                            const at::Tensor& log_var_q, double clamp_min, double clamp_max,
                            std::optional<at::ScalarType> dtype);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> kl_div_pair_loss_backward(
    const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p, const at::Tensor& mu_q,
    const at::Tensor& log_var_q, double clamp_min, double clamp_max, std::array<bool, 4> output_mask);

void kl_div_pair_loss_backward_out(const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p,
                                   const at::Tensor& mu_q, const at::Tensor& log_var_q, double clamp_min, double clamp_max,
                                   const std::optional<at::Tensor>& grad_mu_p, const std::optional<at::Tensor>& grad_log_var_p,
                                   const std::optional<at::Tensor>& grad_mu_q, const std::optional<at::Tensor>& grad_log_var_q);

at::Tensor gaussian_kl_div(const at::Tensor& mu_p, const at::Tensor& log_var_p, const std::optional<at::Tensor>& mu_q,
                           const std::optional<at::Tensor>& log_var_q, double clamp_min, double clamp_max,
                           std::string_view reduction, at::OptionalIntArrayRef dim, bool keepdim,
                           std::optional<at::ScalarType> dtype);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gaussian_kl_div_backward(
    const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p, const std::optional<at::Tensor>& mu_q,
    const std::optional<at::Tensor>& log_var_q, double clamp_min, double clamp_max, std::string_view reduction,
    at::OptionalIntArrayRef dim, std::array<bool, 4> output_mask, bool keepdim);

void gaussian_kl_div_backward_out(const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p,
                                  const std::optional<at::Tensor>& mu_q, const std::optional<at::Tensor>& log_var_q,
                                  double clamp_min, double clamp_max, std::string_view reduction, at::OptionalIntArrayRef dim,
                                  bool keepdim, const std::optional<at::Tensor>& grad_mu_p,
                                  const std::optional<at::Tensor>& grad_log_var_p, const std::optional<at::Tensor>& grad_mu_q,
                                  const std::optional<at::Tensor>& grad_log_var_q);

} // namespace kl_ext::ops
