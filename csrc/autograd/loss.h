// Derivatives of an elementwise loss, from what its file in this folder tells of it (Op):
//
//   kInputs, kForwardName, kBackwardName, kArguments      the operators' names and those of their tensors
//   kNeeds[i][j]                                          whether the gradient of input i needs input j
//   forward, backward                                     the operators
//   curvature(inputs, clamp, v)                           row by row, the Hessian of the term times v, in differentiable
//   operators
//
// First derivatives of any kind come from the backward operator, so that they have the same bits in reverse and forward mode,
// with and without create_graph; second ones from the curvature, and higher ones from differentiating that.
#pragma once

#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include "../checks.h"
#include "node.h"

namespace kl_ext::autograd {

struct Clamp {
  double min;
  double max;
};

inline at::Tensor sum_of(const at::Tensor& a, const at::Tensor& b) { return !a.defined() ? b : !b.defined() ? a : a + b; }

// The derivative of the loss in the direction v, elementwise: sum over i of v_i dloss/dinput_i.
template <class Op, size_t N = Op::kInputs>
at::Tensor directional(Tensors<N> inputs, Clamp clamp, const Tensors<N>& v, c10::SymIntArrayRef shape,
                       const at::TensorOptions& options) {
  for (auto& input : inputs) {
    input = input.expand_symint(shape);
  }
  const at::Tensor one = at::ones({}, options).expand_symint(shape);
  const Tensors<N> derivatives = Op::backward(one, inputs, clamp, defined(v));
  at::Tensor sum;
  for (size_t i = 0; i < N; ++i) {
    if (v[i].defined()) {
      sum = sum_of(sum, derivatives[i] * v[i]);
    }
  }
  return sum.to(options.dtype());
}

// grad_output times the Hessian times v, summed to the shapes of the inputs; undefined where it is zero or not wanted.
template <class Op, size_t N = Op::kInputs>
Tensors<N> second_order(const at::Tensor& grad_output, const Tensors<N>& inputs, Clamp clamp, Tensors<N> v,
                        const std::array<bool, N>& wanted) {
  const bool is_double =
      std::any_of(inputs.begin(), inputs.end(), [](const auto& input) { return input.scalar_type() == at::kDouble; });
  const auto arithmetic = is_double ? at::kDouble : at::kFloat;
  Tensors<N> operands;
  for (size_t i = 0; i < N; ++i) {
    operands[i] = inputs[i].to(arithmetic);
    v[i] = v[i].defined() ? v[i].to(arithmetic) : v[i];
  }
  Tensors<N> rows = Op::curvature(operands, clamp, v);
  for (size_t i = 0; i < N; ++i) {
    if (rows[i].defined()) {
      rows[i] = wanted[i] ? at::sum_to(grad_output * rows[i], inputs[i].sym_sizes()).to(inputs[i].options()) : at::Tensor();
    }
  }
  return rows;
}

template <class Op>
struct BackwardBackward : SavingNode<Op::kInputs + 1> {
  static constexpr size_t N = Op::kInputs;
  using SavingNode<N + 1>::SavingNode;

  std::string name() const override { return std::string(Op::kNodeName) + "Backward"; }

  variable_list apply(variable_list&& grads) override {
    Tensors<N> v;
    std::copy(grads.begin(), grads.end(), v.begin());
    variable_list result(N + 1);
    if (any(defined(v))) {
      const auto saved = this->unpack();
      const at::Tensor& grad_output = saved[0];
      Tensors<N> inputs;
      std::copy(saved.begin() + 1, saved.end(), inputs.begin());
      const Clamp clamp{this->clamp_min, this->clamp_max};
      if (this->task_should_compute_output(0)) {
        result[0] = directional<Op>(inputs, clamp, v, grad_output.sym_sizes(), grad_output.options());
      }
      const auto wanted = this->template wanted<N>(1);
      if (any(wanted)) {
        auto rows = second_order<Op>(grad_output, inputs, clamp, v, wanted);
        std::move(rows.begin(), rows.end(), result.begin() + 1);
      }
    }
    return result;
  }
};

template <class Op>
struct Backward : SavingNode<Op::kInputs> {
  static constexpr size_t N = Op::kInputs;
  using SavingNode<N>::SavingNode;

  std::string name() const override { return Op::kNodeName; }

  variable_list apply(variable_list&& grads) override {
    const at::Tensor& grad_output = grads[0];
    const auto wanted = this->template wanted<N>();
    if (!grad_output.defined() || !any(wanted)) {
      return variable_list(N);
    }
    Tensors<N> inputs = this->unpack();
    for (size_t i = 0; i < N; ++i) {
      if (!inputs[i].defined()) { // no wanted gradient depends on it: any number does
        inputs[i] = at::zeros({}, grad_output.options().dtype(this->dtypes[i]));
      }
    }
    auto gradients = Op::backward(grad_output, inputs, {this->clamp_min, this->clamp_max}, wanted);
    return {std::make_move_iterator(gradients.begin()), std::make_move_iterator(gradients.end())};
  }
};

template <class Op, size_t N>
void save(SavingNode<N>& node, const Tensors<N>& tensors, Clamp clamp, const std::array<bool, N>& needed) {
  for (size_t i = 0; i < N; ++i) {
    node.dtypes[i] = tensors[i].scalar_type();
    if (needed[i]) {
      node.saved[i] = SavedVariable(tensors[i], /*is_output=*/false);
    }
  }
  node.clamp_min = clamp.min;
  node.clamp_max = clamp.max;
}

template <class Op, size_t N = Op::kInputs>
std::array<bool, N> needed_by_gradients(const Tensors<N>& inputs) {
  std::array<bool, N> needed{};
  for (size_t i = 0; i < N; ++i) {
    for (size_t j = 0; j < N && inputs[i].requires_grad(); ++j) {
      needed[j] |= Op::kNeeds[i][j];
    }
  }
  return needed;
}

template <size_t N, size_t... I>
std::array<Argument, N> named(const std::array<const char*, N>& names, const Tensors<N>& tensors, std::index_sequence<I...>) {
  return {{{names[I], tensors[I]}...}};
}

template <size_t N>
std::array<Argument, N> named(const std::array<const char*, N>& names, const Tensors<N>& tensors) {
  return named(names, tensors, std::make_index_sequence<N>());
}

template <class Op, size_t N = Op::kInputs>
at::Tensor forward(const Tensors<N>& inputs, Clamp clamp, std::optional<at::ScalarType> dtype) {
  check_tensors(Op::kForwardName, named(Op::kArguments, inputs));
  check_clamp(Op::kForwardName, clamp.min, clamp.max);
  check_result_dtype(Op::kForwardName, dtype);
  at::Tensor result = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return Op::forward(inputs, clamp, dtype);
  }();
  if (any_requires_grad(inputs)) {
    auto node = make_node<Backward<Op>>(inputs);
    save<Op>(*node, inputs, clamp, needed_by_gradients<Op>(inputs));
    set_history(Tensors<1>{result}, node);
  }
  const auto tangents = tangents_of(inputs);
  if (any(defined(tangents))) {
    result._set_fw_grad(directional<Op>(primals_of(inputs), clamp, tangents, result.sym_sizes(), result.options()), /*level=*/0,
                        /*is_inplace_op=*/false);
  }
  return result;
}

template <class Op, size_t N = Op::kInputs>
Tensors<N> backward(const at::Tensor& grad_output, const Tensors<N>& inputs, Clamp clamp, const std::array<bool, N>& mask) {
  Tensors<N + 1> tensors{grad_output};
  std::copy(inputs.begin(), inputs.end(), tensors.begin() + 1);
  std::array<const char*, N + 1> names{"grad_output"};
  std::copy(Op::kArguments.begin(), Op::kArguments.end(), names.begin() + 1);
  check_tensors(Op::kBackwardName, named(names, tensors));
  check_clamp(Op::kBackwardName, clamp.min, clamp.max);
  Tensors<N> gradients = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return Op::backward(grad_output, inputs, clamp, mask);
  }();
  if (any_requires_grad(tensors)) {
    auto node = make_node<BackwardBackward<Op>>(tensors);
    std::array<bool, N + 1> needed;
    needed.fill(true);
    save<Op>(*node, tensors, clamp, needed);
    set_history(gradients, node);
  }
  const at::Tensor grad_tangent = grad_output._fw_grad(/*level=*/0);
  const auto tangents = tangents_of(inputs);
  if (grad_tangent.defined() || any(defined(tangents))) {
    const auto primals = primals_of(inputs);
    Tensors<N> from_inputs;
    if (any(defined(tangents))) {
      from_inputs = second_order<Op>(grad_output._fw_primal(/*level=*/0), primals, clamp, tangents, mask);
    }
    Tensors<N> from_grad;
    if (grad_tangent.defined()) {
      from_grad = Op::backward(grad_tangent, primals, clamp, mask);
    }
    for (size_t i = 0; i < N; ++i) {
      const at::Tensor tangent = sum_of(from_inputs[i], from_grad[i]);
      if (mask[i] && tangent.defined()) {
        gradients[i]._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
      }
    }
  }
  return gradients;
}

} // namespace kl_ext::autograd
