#include <torch/library.h>

#include "../ops.h"
#include "formulas.h"
#include "loss.h"

namespace kl_ext::autograd {
namespace {

struct SingleLoss : Elementwise<SingleFormula> {
  static constexpr const char* kForwardName = "kl_div_single_loss";
  static constexpr const char* kBackwardName = "kl_div_single_loss_backward";
  static constexpr const char* kNodeName = "KlDivSingleLossBackward";
  static constexpr std::array<const char*, 2> kArguments = {"mu", "log_var"};

  at::Tensor forward(const Tensors<2>& x, std::optional<at::ScalarType> dtype) const {
    return ops::kl_div_single_loss(x[0], x[1], clamp_min, clamp_max, dtype);
  }

  Tensors<2> backward(const at::Tensor& grad_output, const Tensors<2>& x, std::array<bool, 2> mask) const {
    auto [mu, log_var] = ops::kl_div_single_loss_backward(grad_output, x[0], x[1], clamp_min, clamp_max, mask);
    return {std::move(mu), std::move(log_var)};
  }

  void backward_out(const at::Tensor& grad_output, const Tensors<2>& x, const Tensors<2>& gradients) const {
    ops::kl_div_single_loss_backward_out(grad_output, x[0], x[1], clamp_min, clamp_max, optional(gradients[0]),
                                         optional(gradients[1]));
  }

  Tensors<2> terms_backward(const at::Tensor& grad_terms, const Tensors<2>& x, std::array<bool, 2> mask) const {
    return backward(grad_terms, x, mask);
  }
};

SingleLoss with(double clamp_min, double clamp_max) { return {{{clamp_min, clamp_max}}}; }

at::Tensor kl_div_single_loss(const at::Tensor& mu, const at::Tensor& log_var, double clamp_min, double clamp_max,
                              std::optional<at::ScalarType> dtype) {
  return forward(with(clamp_min, clamp_max), {mu, log_var}, dtype);
}

std::tuple<at::Tensor, at::Tensor> kl_div_single_loss_backward(const at::Tensor& grad_output, const at::Tensor& mu,
                                                               const at::Tensor& log_var, double clamp_min, double clamp_max,
                                                               std::array<bool, 2> output_mask) {
  return std::tuple_cat(backward(with(clamp_min, clamp_max), grad_output, {mu, log_var}, output_mask));
}

void kl_div_single_loss_backward_out(const at::Tensor& grad_output, const at::Tensor& mu, const at::Tensor& log_var,
                                     double clamp_min, double clamp_max, const std::optional<at::Tensor>& grad_mu,
                                     const std::optional<at::Tensor>& grad_log_var) {
  backward_out(with(clamp_min, clamp_max), grad_output, {mu, log_var},
               {grad_mu.value_or(at::Tensor()), grad_log_var.value_or(at::Tensor())});
}

TORCH_LIBRARY_IMPL(kl_ext, Autograd, m) {
  m.impl("kl_div_single_loss", kl_div_single_loss);
  m.impl("kl_div_single_loss_backward", kl_div_single_loss_backward);
  m.impl("kl_div_single_loss_backward.out", kl_div_single_loss_backward_out);
}

} // namespace
} // namespace kl_ext::autograd
