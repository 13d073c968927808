// What autograd needs to know of each formula: which gradient needs which input, and the second derivatives, in differentiable
// operators.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "node.h"

namespace kl_ext::autograd {

// The gradient where the clamp lets it pass, else 0.
inline at::Tensor inside(const at::Tensor& row, const at::Tensor& log_var, const Options& options) {
  return at::where((log_var >= options.clamp_min).logical_and(log_var <= options.clamp_max), row, 0.0);
}

// The clamped log-variance. Not at::clamp, whose own derivatives at the bounds are 0 from torch 2.14 on: here they pass in
// every version and every order.
inline at::Tensor clamped(const at::Tensor& log_var, const Options& options) {
  return at::where(log_var < options.clamp_min, options.clamp_min,
                   at::where(log_var > options.clamp_max, options.clamp_max, log_var));
}

template <class Formula>
struct Derivatives;

// Against N(0, 1). The Hessian is diagonal: 1 for mu, e^log_var / 2 for log_var within the clamp.
template <>
struct Derivatives<math::StandardDivergence> {
  static constexpr bool kNeeds[kMaxInputs][kMaxInputs] = {{true, false}, {false, true}};
  static constexpr double kHarmless[kMaxInputs] = {0, 0};

  static Tensors curvature(const Options& options, const Tensors& x, const Tensors& v) {
    if (!v[1].defined()) {
      return {v[0], v[1]};
    }
    return {v[0], inside(0.5 * at::exp(clamped(x[1], options)) * v[1], x[1], options)};
  }
};

// KL(p||q). With D = mu_p - mu_q, w = e^-lq and e = e^(lp - lq), its gradient is (D w, (e - 1) / 2, -D w, (1 - e - D^2 w) / 2)
// in the order of the inputs. This is its derivative in the direction v; v_D is the difference of the means' directions:
template <>
struct Derivatives<math::Divergence> {
  static constexpr bool kNeeds[kMaxInputs][kMaxInputs] = {
      {true, false, true, true}, {false, true, false, true}, {true, false, true, true}, {true, true, true, true}};
  static constexpr double kHarmless[kMaxInputs] = {0, 0, 0, 0};

  static Tensors curvature(const Options& options, const Tensors& x, const Tensors& v) {
    const double scale = options.op->description.scale;
    const at::Tensor lp = clamped(x[1], options);
    const at::Tensor lq = clamped(x[3], options);
    const at::Tensor w = at::exp(-lq);
    const at::Tensor scaled = (x[0] - x[2]) * w;
    const auto passing = [&](const at::Tensor& row, const at::Tensor& log_var) { return inside(row, log_var, options); };
    const at::Tensor zero = at::zeros({}, x[0].options());
    const auto or_zero = [&](const at::Tensor& direction) { return direction.defined() ? direction : zero; };
    const at::Tensor v_mean = or_zero(v[0]) - or_zero(v[2]);
    const at::Tensor v_p = passing(or_zero(v[1]), x[1]);
    const at::Tensor v_q = passing(or_zero(v[3]), x[3]);
    const at::Tensor mean = scale * (w * v_mean - scaled * v_q);
    const at::Tensor ratio = 0.5 * scale * at::exp(lp - lq) * (v_p - v_q);
    const at::Tensor q = scale * (0.5 * scaled * (x[0] - x[2]) * v_q - scaled * v_mean) - ratio;
    return {mean, passing(ratio, x[1]), -mean, passing(q, x[3])};
  }
};

// From standard deviations, against N(0, 1). The Hessian is diagonal: 1 for the mean, 1 + 1 / p^2 for the deviation p.
template <>
struct Derivatives<math::StandardNormalDivergence> {
  static constexpr bool kNeeds[kMaxInputs][kMaxInputs] = {{true, false}, {false, true}};
  static constexpr double kHarmless[kMaxInputs] = {0, 1};

  static Tensors curvature(const Options&, const Tensors& x, const Tensors& v) {
    if (!v[1].defined()) {
      return {v[0], v[1]};
    }
    const at::Tensor inverse = 1.0 / x[1];
    return {v[0], v[1] + inverse * inverse * v[1]};
  }
};

// From standard deviations p and q: math/normal.h.
template <>
struct Derivatives<math::NormalDivergence> {
  static constexpr bool kNeeds[kMaxInputs][kMaxInputs] = {
      {true, false, true, true}, {false, true, false, true}, {true, false, true, true}, {true, true, true, true}};
  static constexpr double kHarmless[kMaxInputs] = {0, 1, 0, 1};

  static Tensors curvature(const Options&, const Tensors& x, const Tensors& v) {
    const at::Tensor zero = at::zeros({}, x[0].options());
    const auto or_zero = [&](const at::Tensor& direction) { return direction.defined() ? direction : zero; };
    const at::Tensor inverse = 1.0 / x[3];
    const auto over_square = [&](const at::Tensor& row) { return row * inverse * inverse; };
    const at::Tensor distance = (x[0] - x[2]) * inverse;
    const at::Tensor d = (x[1] - x[3]) * inverse;
    const at::Tensor r = x[1] * inverse;
    const at::Tensor s = x[3] / x[1];
    const at::Tensor v_mean = or_zero(v[0]) - or_zero(v[2]);
    const at::Tensor v_q = or_zero(v[3]);
    const at::Tensor v_d = or_zero(v[1]) - v_q;
    const at::Tensor mean = over_square(v_mean - 2.0 * distance * v_q);
    const at::Tensor p = over_square((1.0 + s * s) * v_d - d * (2.0 + s + s * s) * v_q);
    const at::Tensor q =
        over_square(d * (3.0 * r + 1.0) * v_q - 2.0 * r * v_d + distance * (3.0 * distance * v_q - 2.0 * v_mean));
    return {mean, p, -mean, q};
  }
};

// The same where the type of the formula is not known.
struct AnyDerivatives {
  const bool (&needs)[kMaxInputs][kMaxInputs]; // whether the gradient of input i needs input j
  const double (&harmless)[kMaxInputs];        // inputs at which everything is finite
  // The Hessian of the term times v, one row for each input; undefined where it is zero.
  Tensors (*curvature)(const Options& options, const Tensors& inputs, const Tensors& v);
};

template <class... F>
const AnyDerivatives& derivatives_of(int formula, math::FormulaList<F...>) {
  static constexpr AnyDerivatives kAll[] = {{Derivatives<F>::kNeeds, Derivatives<F>::kHarmless, Derivatives<F>::curvature}...};
  return kAll[formula];
}

inline const AnyDerivatives& derivatives_of(int formula) { return derivatives_of(formula, math::Formulas()); }

} // namespace kl_ext::autograd
