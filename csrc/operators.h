// The operators. Each is described once, below; its schemas, typed handles, registrations and fast binding follow from the
// description (signature.h).
//
//   name(inputs, [weight], *, [clamp_min, clamp_max], [reduction, dim, keepdim], dtype) -> Tensor
//   name_backward(grad_output, inputs, [clamp_min, clamp_max], [reduction, dim], output_mask, [keepdim, weight]) -> gradients
//   name_backward.out(grad_output, inputs, [clamp_min, clamp_max], [reduction, dim, keepdim, weight], *, gradients) -> ()
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <string_view>

#include "checks.h"
#include "math/formulas.h"

namespace kl_ext {

constexpr size_t kMaxInputs = 4;

struct Description {
  const char* name;
  std::array<const char*, kMaxInputs> inputs;
  size_t least; // inputs that are required; the others are given together or not at all
  size_t most;
  bool clamps;  // has clamp_min and clamp_max
  bool reduces; // has weight, reduction, dim and keepdim
  int of_least; // the formula of `least` inputs: kFormula of math/formulas.h
  int of_most;
  // The operator returns scale * divergence + offset.
  double scale = 1;
  double offset = 0;
};

inline constexpr Description kKlDivSingleLoss = {
    .name = "kl_div_single_loss",
    .inputs = {"mu", "log_var"},
    .least = 2,
    .most = 2,
    .clamps = true,
    .reduces = false,
    .of_least = math::kFormula<math::StandardDivergence>,
    .of_most = math::kFormula<math::StandardDivergence>,
};

inline constexpr Description kKlDivPairLoss = {
    .name = "kl_div_pair_loss",
    .inputs = {"mu_p", "log_var_p", "mu_q", "log_var_q"},
    .least = 4,
    .most = 4,
    .clamps = true,
    .reduces = false,
    .of_least = math::kFormula<math::Divergence>,
    .of_most = math::kFormula<math::Divergence>,
    .scale = 2,
    .offset = 0.5,
};

inline constexpr Description kGaussianKlDiv = {
    .name = "gaussian_kl_div",
    .inputs = {"mu_p", "log_var_p", "mu_q", "log_var_q"},
    .least = 2,
    .most = 4,
    .clamps = true,
    .reduces = true,
    .of_least = math::kFormula<math::StandardDivergence>,
    .of_most = math::kFormula<math::Divergence>,
};

inline constexpr Description kNormalKlDiv = {
    .name = "normal_kl_div",
    .inputs = {"loc_p", "scale_p", "loc_q", "scale_q"},
    .least = 2,
    .most = 4,
    .clamps = false,
    .reduces = true,
    .of_least = math::kFormula<math::StandardNormalDivergence>,
    .of_most = math::kFormula<math::NormalDivergence>,
};

template <const Description&... descriptions>
struct OperatorList {};

using Operators = OperatorList<kKlDivSingleLoss, kKlDivPairLoss, kGaussianKlDiv, kNormalKlDiv>;

using Gradients = std::array<at::Tensor, kMaxInputs>; // undefined where one is not wanted
using Mask = std::array<bool, kMaxInputs>;

struct Operator;

// The arguments of a call, except grad_output and gradients. The caller owns them.
struct Call {
  explicit Call(const Operator& called) : op(&called) {}

  NamedTensors inputs() const { return NamedTensors(tensors).slice(0, tensors.size() - (has_weight ? 1 : 0)); }

  // Null if it was not given.
  const at::Tensor* input(size_t i) const {
    return is_given[i] ? &tensors[std::count(is_given.begin(), is_given.begin() + i, true)].tensor : nullptr;
  }

  const at::Tensor* weight() const { return has_weight ? &tensors.back().tensor : nullptr; }

  int formula() const;

  const Operator* op;
  c10::SmallVector<NamedTensor, kMaxInputs + 1> tensors; // the inputs that are given, then the weight
  bool has_weight = false;
  std::array<bool, kMaxInputs> is_given{}; // for each input of the description
  double clamp_min = -std::numeric_limits<double>::infinity();
  double clamp_max = std::numeric_limits<double>::infinity();
  std::string_view reduction = "none";
  at::OptionalIntArrayRef dim;
  bool keepdim = false;
  std::optional<at::ScalarType> dtype;
};

// A description and its operators. Each call goes through the dispatcher, so that autograd, autocast, vmap and fake tensors
// apply.
struct Operator {
  const Description& description;
  const char* backward_name;
  at::Tensor (*forward)(const Call& call);
  Gradients (*backward)(const at::Tensor& grad_output, const Call& call, Mask mask);
  // Overwrites the gradients that are given and computes no others.
  void (*backward_out)(const at::Tensor& grad_output, const Call& call, const Gradients& gradients);
};

inline int Call::formula() const {
  const Description& d = op->description;
  return inputs().size() == d.most ? d.of_most : d.of_least;
}

// The optional inputs are given all together or not at all.
inline void check_together(const char* function, const Call& call) {
  const Description& d = call.op->description;
  const auto first = call.is_given.begin() + d.least;
  const auto end = call.is_given.begin() + d.most;
  TORCH_CHECK_VALUE(first == end || std::find(first, end, !*first) == end, function, ": expected ", d.inputs[d.least], " and ",
                    d.inputs[d.most - 1], " together or neither, got ",
                    d.inputs[std::find(first, end, true) - call.is_given.begin()], " alone");
}

} // namespace kl_ext
