#include <ATen/ops/clamp.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include "../ops.h"
#include "loss.h"

namespace kl_ext::autograd {
namespace {

struct SingleLoss {
  static constexpr size_t kInputs = 2;
  static constexpr const char* kForwardName = "kl_div_single_loss";
  static constexpr const char* kBackwardName = "kl_div_single_loss_backward";
  static constexpr const char* kNodeName = "KlDivSingleLossBackward";
  static constexpr std::array<const char*, 2> kArguments = {"mu", "log_var"};
  static constexpr bool kNeeds[2][2] = {{true, false}, {false, true}};

  static at::Tensor forward(const Tensors<2>& x, Clamp clamp, std::optional<at::ScalarType> dtype) {
    return ops::kl_div_single_loss(x[0], x[1], clamp.min, clamp.max, dtype);
  }

  static Tensors<2> backward(const at::Tensor& grad_output, const Tensors<2>& x, Clamp clamp, std::array<bool, 2> mask) {
    auto [mu, log_var] = ops::kl_div_single_loss_backward(grad_output, x[0], x[1], clamp.min, clamp.max, mask);
    return {std::move(mu), std::move(log_var)};
  }

  // The Hessian is diagonal: 1 for mu, e^log_var / 2 for log_var within the clamp.
  static Tensors<2> curvature(const Tensors<2>& x, Clamp clamp, const Tensors<2>& v) {
    const at::Tensor& log_var = x[1];
    at::Tensor row;
    if (v[1].defined()) {
      row = at::where((log_var >= clamp.min).logical_and(log_var <= clamp.max), 0.5 * at::exp(log_var) * v[1], 0.0);
    }
    return {v[0], row};
  }
};

at::Tensor kl_div_single_loss(const at::Tensor& mu, const at::Tensor& log_var, double clamp_min, double clamp_max,
                              std::optional<at::ScalarType> dtype) {
  return forward<SingleLoss>({mu, log_var}, {clamp_min, clamp_max}, dtype);
}

std::tuple<at::Tensor, at::Tensor> kl_div_single_loss_backward(const at::Tensor& grad_output, const at::Tensor& mu,
                                                               const at::Tensor& log_var, double clamp_min, double clamp_max,
                                                               std::array<bool, 2> output_mask) {
  return std::tuple_cat(backward<SingleLoss>(grad_output, {mu, log_var}, {clamp_min, clamp_max}, output_mask));
}

TORCH_LIBRARY_IMPL(kl_ext, Autograd, m) {
  m.impl("kl_div_single_loss", kl_div_single_loss);
  m.impl("kl_div_single_loss_backward", kl_div_single_loss_backward);
}

} // namespace
} // namespace kl_ext::autograd
