#include <torch/library.h>

#include "../ops.h"
#include "formulas.h"
#include "loss.h"

namespace kl_ext::autograd {
namespace {

struct PairLoss : Elementwise<PairFormula<2>> {
  static constexpr const char* kForwardName = "kl_div_pair_loss";
  static constexpr const char* kBackwardName = "kl_div_pair_loss_backward";
  static constexpr const char* kNodeName = "KlDivPairLossBackward";
  static constexpr std::array<const char*, 4> kArguments = {"mu_p", "log_var_p", "mu_q", "log_var_q"};

  at::Tensor forward(const Tensors<4>& x, std::optional<at::ScalarType> dtype) const {
    return ops::kl_div_pair_loss(x[0], x[1], x[2], x[3], clamp_min, clamp_max, dtype);
  }

  Tensors<4> backward(const at::Tensor& grad_output, const Tensors<4>& x, std::array<bool, 4> mask) const {
    auto [mu_p, log_var_p, mu_q, log_var_q] =
        ops::kl_div_pair_loss_backward(grad_output, x[0], x[1], x[2], x[3], clamp_min, clamp_max, mask);
    return {std::move(mu_p), std::move(log_var_p), std::move(mu_q), std::move(log_var_q)};
  }

  void backward_out(const at::Tensor& grad_output, const Tensors<4>& x, const Tensors<4>& gradients) const {
    ops::kl_div_pair_loss_backward_out(grad_output, x[0], x[1], x[2], x[3], clamp_min, clamp_max, optional(gradients[0]),
                                       optional(gradients[1]), optional(gradients[2]), optional(gradients[3]));
  }

  Tensors<4> terms_backward(const at::Tensor& grad_terms, const Tensors<4>& x, std::array<bool, 4> mask) const {
    return backward(grad_terms, x, mask);
  }
};

PairLoss with(double clamp_min, double clamp_max) { return {{{clamp_min, clamp_max}}}; }

at::Tensor kl_div_pair_loss(const at::Tensor& mu_p, const at::Tensor& log_var_p, const at::Tensor& mu_q,
                            const at::Tensor& log_var_q, double clamp_min, double clamp_max,
                            std::optional<at::ScalarType> dtype) {
  return forward(with(clamp_min, clamp_max), {mu_p, log_var_p, mu_q, log_var_q}, dtype);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> kl_div_pair_loss_backward(
    const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p, const at::Tensor& mu_q,
    const at::Tensor& log_var_q, double clamp_min, double clamp_max, std::array<bool, 4> output_mask) {
  return std::tuple_cat(backward(with(clamp_min, clamp_max), grad_output, {mu_p, log_var_p, mu_q, log_var_q}, output_mask));
}

void kl_div_pair_loss_backward_out(const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p,
                                   const at::Tensor& mu_q, const at::Tensor& log_var_q, double clamp_min, double clamp_max,
                                   const std::optional<at::Tensor>& grad_mu_p, const std::optional<at::Tensor>& grad_log_var_p,
                                   const std::optional<at::Tensor>& grad_mu_q,
                                   const std::optional<at::Tensor>& grad_log_var_q) {
  backward_out(with(clamp_min, clamp_max), grad_output, {mu_p, log_var_p, mu_q, log_var_q},
               {grad_mu_p.value_or(at::Tensor()), grad_log_var_p.value_or(at::Tensor()), grad_mu_q.value_or(at::Tensor()),
                grad_log_var_q.value_or(at::Tensor())});
}

TORCH_LIBRARY_IMPL(kl_ext, Autograd, m) {
  m.impl("kl_div_pair_loss", kl_div_pair_loss);
  m.impl("kl_div_pair_loss_backward", kl_div_pair_loss_backward);
  m.impl("kl_div_pair_loss_backward.out", kl_div_pair_loss_backward_out);
}

} // namespace
} // namespace kl_ext::autograd
