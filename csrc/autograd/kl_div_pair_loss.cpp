#include <ATen/ops/clamp.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../ops.h"
#include "loss.h"

namespace kl_ext::autograd {
namespace {

struct PairLoss {
  static constexpr size_t kInputs = 4;
  static constexpr const char* kForwardName = "kl_div_pair_loss";
  static constexpr const char* kBackwardName = "kl_div_pair_loss_backward";
  static constexpr const char* kNodeName = "KlDivPairLossBackward";
  static constexpr std::array<const char*, 4> kArguments = {"mu_p", "log_var_p", "mu_q", "log_var_q"};
  static constexpr bool kNeeds[4][4] = {
      {true, false, true, true}, {false, true, false, true}, {true, false, true, true}, {true, true, true, true}};

  static at::Tensor forward(const Tensors<4>& x, Clamp clamp, std::optional<at::ScalarType> dtype) {
    return ops::kl_div_pair_loss(x[0], x[1], x[2], x[3], clamp.min, clamp.max, dtype);
  }

  static Tensors<4> backward(const at::Tensor& grad_output, const Tensors<4>& x, Clamp clamp, std::array<bool, 4> mask) {
    auto [mu_p, log_var_p, mu_q, log_var_q] =
        ops::kl_div_pair_loss_backward(grad_output, x[0], x[1], x[2], x[3], clamp.min, clamp.max, mask);
    return {std::move(mu_p), std::move(log_var_p), std::move(mu_q), std::move(log_var_q)};
  }

  // With D = mu_p - mu_q, w = e^-lq and e = e^(lp - lq), the gradient is (2 D w, e - 1, -2 D w, 1 - e - D^2 w) in the order of
  // the inputs. Its derivative in the direction v, with v_D the difference of the means' directions:
  static Tensors<4> curvature(const Tensors<4>& x, Clamp clamp, const Tensors<4>& v) {
    const at::Tensor lp = at::clamp(x[1], clamp.min, clamp.max);
    const at::Tensor lq = at::clamp(x[3], clamp.min, clamp.max);
    const at::Tensor w = at::exp(-lq);
    const at::Tensor scaled = (x[0] - x[2]) * w;
    const at::Tensor e = at::exp(lp - lq);
    const auto inside = [&](const at::Tensor& row, const at::Tensor& log_var) {
      return at::where((log_var >= clamp.min).logical_and(log_var <= clamp.max), row, 0.0);
    };
    const at::Tensor zero = at::zeros({}, x[0].options());
    const auto or_zero = [&](const at::Tensor& direction) { return direction.defined() ? direction : zero; };
    const at::Tensor v_mean = or_zero(v[0]) - or_zero(v[2]);
    const at::Tensor v_p = inside(or_zero(v[1]), x[1]);
    const at::Tensor v_q = inside(or_zero(v[3]), x[3]);
    const at::Tensor mean = 2.0 * (w * v_mean - scaled * v_q);
    const at::Tensor ratio = e * (v_p - v_q);
    const at::Tensor q = scaled * (x[0] - x[2]) * v_q - 2.0 * scaled * v_mean - ratio;
    return {mean, inside(ratio, x[1]), -mean, inside(q, x[3])};
  }
};

at::Tensor kl_div_pair_loss(const at::Tensor& mu_p, const at::Tensor& log_var_p, const at::Tensor& mu_q,
                            const at::Tensor& log_var_q, double clamp_min, double clamp_max,
                            std::optional<at::ScalarType> dtype) {
  return forward<PairLoss>({mu_p, log_var_p, mu_q, log_var_q}, {clamp_min, clamp_max}, dtype);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> kl_div_pair_loss_backward(
    const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p, const at::Tensor& mu_q,
    const at::Tensor& log_var_q, double clamp_min, double clamp_max, std::array<bool, 4> output_mask) {
  return std::tuple_cat(
      backward<PairLoss>(grad_output, {mu_p, log_var_p, mu_q, log_var_q}, {clamp_min, clamp_max}, output_mask));
}

TORCH_LIBRARY_IMPL(kl_ext, Autograd, m) {
  m.impl("kl_div_pair_loss", kl_div_pair_loss);
  m.impl("kl_div_pair_loss_backward", kl_div_pair_loss_backward);
}

} // namespace
} // namespace kl_ext::autograd
