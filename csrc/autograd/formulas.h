// The formulas' second derivatives, in differentiable operators, and which gradient needs which input.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "node.h"

namespace kl_ext::autograd {

// Where the clamp lets a gradient pass.
inline at::Tensor inside(const at::Tensor& row, const at::Tensor& log_var, double clamp_min, double clamp_max) {
  return at::where((log_var >= clamp_min).logical_and(log_var <= clamp_max), row, 0.0);
}

// The log-variance that is used. Not by at::clamp, whose own derivatives at the bounds are 0 from torch 2.14 on: here they pass
// in every version and every order.
inline at::Tensor clamped(const at::Tensor& log_var, double clamp_min, double clamp_max) {
  return at::where(log_var < clamp_min, clamp_min, at::where(log_var > clamp_max, clamp_max, log_var));
}

// Against the standard normal. The Hessian is diagonal: 1 for mu, e^log_var / 2 for log_var within the clamp.
struct SingleFormula {
  static constexpr size_t kInputs = 2;
  static constexpr bool kNeeds[2][2] = {{true, false}, {false, true}};

  double clamp_min = 0;
  double clamp_max = 0;

  Tensors<2> curvature(const Tensors<2>& x, const Tensors<2>& v) const {
    if (!v[1].defined()) {
      return {v[0], v[1]};
    }
    const at::Tensor log_var = clamped(x[1], clamp_min, clamp_max);
    return {v[0], inside(0.5 * at::exp(log_var) * v[1], x[1], clamp_min, clamp_max)};
  }
};

// Of two Gaussians, `scale` times the divergence. With D = mu_p - mu_q, w = e^-lq and e = e^(lp - lq), the gradient of the
// divergence is (D w, (e - 1) / 2, -D w, (1 - e - D^2 w) / 2) in the order of the inputs. Its derivative in the direction v,
// with v_D the difference of the means' directions:
template <int scale>
struct PairFormula {
  static constexpr size_t kInputs = 4;
  static constexpr bool kNeeds[4][4] = {
      {true, false, true, true}, {false, true, false, true}, {true, false, true, true}, {true, true, true, true}};

  double clamp_min = 0;
  double clamp_max = 0;

  Tensors<4> curvature(const Tensors<4>& x, const Tensors<4>& v) const {
    const at::Tensor lp = clamped(x[1], clamp_min, clamp_max);
    const at::Tensor lq = clamped(x[3], clamp_min, clamp_max);
    const at::Tensor w = at::exp(-lq);
    const at::Tensor scaled = (x[0] - x[2]) * w;
    const auto passing = [&](const at::Tensor& row, const at::Tensor& log_var) {
      return inside(row, log_var, clamp_min, clamp_max);
    };
    const at::Tensor zero = at::zeros({}, x[0].options());
    const auto or_zero = [&](const at::Tensor& direction) { return direction.defined() ? direction : zero; };
    const at::Tensor v_mean = or_zero(v[0]) - or_zero(v[2]);
    const at::Tensor v_p = passing(or_zero(v[1]), x[1]);
    const at::Tensor v_q = passing(or_zero(v[3]), x[3]);
    const at::Tensor mean = double(scale) * (w * v_mean - scaled * v_q);
    const at::Tensor ratio = 0.5 * scale * at::exp(lp - lq) * (v_p - v_q);
    const at::Tensor q = scale * (0.5 * scaled * (x[0] - x[2]) * v_q - scaled * v_mean) - ratio;
    return {mean, passing(ratio, x[1]), -mean, passing(q, x[3])};
  }
};

// What is missing of an Op for a loss that is not reduced.
template <class Formula>
struct Elementwise : Formula {
  static bool needs_shapes() { return false; }
  static at::Tensor reduce(const at::Tensor& terms) { return terms; }
  static at::Tensor unreduce(const at::Tensor& grad_output, c10::SymIntArrayRef) { return grad_output; }

  void collect(CompiledNodeArgs& args) const {
    args.collect(this->clamp_min);
    args.collect(this->clamp_max);
  }
};

} // namespace kl_ext::autograd
