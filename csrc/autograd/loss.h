// Derivatives of a loss, from what its file in this folder tells of it. Op holds the arguments that are not tensors, and has
//
//   kInputs, kForwardName, kBackwardName, kArguments      the operators' names and those of their tensors
//   kNeeds[i][j]                                          whether the gradient of input i needs input j
//   needs_shapes()                                        whether it needs the shape of the terms, which grad_output lacks
//   forward(inputs, dtype)                                the operator
//   backward(grad_output, inputs, mask)                   its backward operator
//   backward_out(grad_output, inputs, gradients)          the same into given tensors
//   terms_backward(grad_terms, inputs, mask)              that of the terms before their reduction, if there is one
//   reduce(terms), unreduce(grad_output, shape)           the reduction; the gradient of the terms, broadcasting with them
//   curvature(inputs, v)                                  row by row, the Hessian of the term times v, differentiable
//   collect(args)                                         what compiled autograd must know of the arguments
//
// First derivatives of any kind come from the backward operator, so that they have the same bits in reverse and forward mode,
// with and without create_graph; second ones from the curvature, and higher ones from differentiating that.
#pragma once

#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/new_zeros.h>
#include <ATen/ops/ones.h>

#include "../checks.h"
#include "../memory.h"
#include "halves.h"
#include "node.h"

namespace kl_ext::autograd {

// A gradient that is wanted.
inline std::optional<at::Tensor> optional(const at::Tensor& gradient) {
  return gradient.defined() ? std::optional(gradient) : std::nullopt;
}

inline at::Tensor sum_of(const at::Tensor& a, const at::Tensor& b) { return !a.defined() ? b : !b.defined() ? a : a + b; }

// That of grad_output, unless it is reduced: then all inputs are there to tell.
template <class Op, size_t N = Op::kInputs>
c10::SymDimVector shape_of_terms(const Op& op, const at::Tensor& grad_output, const Tensors<N>& inputs) {
  c10::SymDimVector shape(op.needs_shapes() ? inputs[0].sym_sizes() : grad_output.sym_sizes());
  for (const auto& input : inputs) {
    shape = at::infer_size_symdimvector(shape, input.sym_sizes());
  }
  return shape;
}

// float64 if any tensor is, else float32: in which derivatives are combined, rounded to the dtype of the result at the end.
template <size_t N>
at::ScalarType arithmetic_of(const Tensors<N>& tensors, at::ScalarType dtype) {
  const bool is_double = dtype == at::kDouble || std::any_of(tensors.begin(), tensors.end(), [](const auto& tensor) {
                           return tensor.scalar_type() == at::kDouble;
                         });
  return is_double ? at::kDouble : at::kFloat;
}

// The derivative of the loss in the direction v: the sum over i of v_i dterm/dinput_i, reduced as the terms are.
template <class Op, size_t N = Op::kInputs>
at::Tensor directional(const Op& op, Tensors<N> inputs, const Tensors<N>& v, c10::SymIntArrayRef shape,
                       const at::TensorOptions& options) {
  const auto arithmetic = arithmetic_of(inputs, c10::typeMetaToScalarType(options.dtype()));
  for (auto& input : inputs) {
    input = input.to(arithmetic).expand_symint(shape);
  }
  const at::Tensor one = at::ones({}, options.dtype(arithmetic)).expand_symint(shape);
  const Tensors<N> derivatives = op.terms_backward(one, inputs, defined(v));
  at::Tensor sum;
  for (size_t i = 0; i < N; ++i) {
    if (v[i].defined()) {
      sum = sum_of(sum, derivatives[i] * v[i]);
    }
  }
  return op.reduce(sum).to(options.dtype());
}

// grad_output times the Hessian times v, summed to the shapes of the inputs; undefined where it is zero or not wanted.
template <class Op, size_t N = Op::kInputs>
Tensors<N> second_order(const Op& op, const at::Tensor& grad_output, const Tensors<N>& inputs, Tensors<N> v,
                        const std::array<bool, N>& wanted, c10::SymIntArrayRef shape) {
  const bool is_double =
      std::any_of(inputs.begin(), inputs.end(), [](const auto& input) { return input.scalar_type() == at::kDouble; });
  const auto arithmetic = is_double ? at::kDouble : at::kFloat;
  Tensors<N> operands;
  for (size_t i = 0; i < N; ++i) {
    operands[i] = inputs[i].to(arithmetic);
    v[i] = v[i].defined() ? v[i].to(arithmetic) : v[i];
  }
  const at::Tensor grad_terms = op.unreduce(grad_output.to(arithmetic), shape);
  Tensors<N> rows = op.curvature(operands, v);
  for (size_t i = 0; i < N; ++i) {
    if (rows[i].defined()) {
      rows[i] = wanted[i] ? at::sum_to(grad_terms * rows[i].expand_symint(shape), inputs[i].sym_sizes()).to(inputs[i].options())
                          : at::Tensor();
    }
  }
  return rows;
}

template <class Op>
struct BackwardBackward : SavingNode<Op, Op::kInputs + 1> {
  static constexpr size_t N = Op::kInputs;
  using SavingNode<Op, N + 1>::SavingNode;

  std::string name() const override { return std::string(Op::kNodeName) + "Backward"; }

  variable_list apply(variable_list&& grads) override {
    Tensors<N> v;
    std::copy_n(grads.begin(), N, v.begin());
    variable_list result(N + 1);
    if (any(defined(v))) {
      const auto saved = this->unpack();
      const at::Tensor& grad_output = saved[0];
      Tensors<N> inputs;
      std::copy(saved.begin() + 1, saved.end(), inputs.begin());
      const auto shape = shape_of_terms(this->op, grad_output, inputs);
      if (this->task_should_compute_output(0)) {
        result[0] = directional(this->op, inputs, v, shape, grad_output.options());
      }
      const auto wanted = this->template wanted<N>(1);
      if (any(wanted)) {
        auto rows = second_order(this->op, grad_output, inputs, v, wanted, shape);
        std::move(rows.begin(), rows.end(), result.begin() + 1);
      }
    }
    return result;
  }
};

template <class Op>
struct Backward : SavingNode<Op, Op::kInputs> {
  static constexpr size_t N = Op::kInputs;
  using SavingNode<Op, N>::SavingNode;

  std::string name() const override { return Op::kNodeName; }

  variable_list apply(variable_list&& grads) override {
    const at::Tensor& grad_output = grads[0];
    const auto wanted = this->template wanted<N>();
    variable_list result(this->num_outputs());
    if (!grad_output.defined() || !any(wanted)) {
      return result;
    }
    Tensors<N> inputs = this->unpack();
    for (size_t i = 0; i < N; ++i) {
      if (!inputs[i].defined()) { // no wanted gradient depends on it, but for the shape of the terms: any number does
        // Of grad_output, not of its device, which compiled autograd does not know yet.
        inputs[i] = grad_output.new_zeros({}, this->dtypes[i]).expand_symint(this->shape);
      }
    }
    if (!apply_to_halves(grad_output, inputs, wanted, result)) {
      auto gradients = this->op.backward(grad_output, inputs, wanted);
      std::move(gradients.begin(), gradients.end(), result.begin());
    }
    return result;
  }

  // Edges to what pairs of inputs are halves of, after those to the inputs.
  void add_edges_of_halves(const Tensors<N>& inputs) {
    for (size_t pair = 0; pair < N / 2; ++pair) {
      const size_t i = 2 * pair;
      halves[pair] = find_halves(inputs[i], inputs[i + 1], this->next_edge(i), this->next_edge(i + 1));
      if (halves[pair]) {
        this->add_next_edge(this->next_edge(i).function->next_edge(0));
      }
    }
  }

  std::array<std::optional<Halves>, N / 2> halves;

 private:
  // Writes the gradients of halves into that of the whole, where nobody can tell; false if there are none.
  bool apply_to_halves(const at::Tensor& grad_output, const Tensors<N>& inputs, const std::array<bool, N>& wanted,
                       variable_list& result) {
    if (this->num_outputs() == N || is_result_observed(*this) || at::GradMode::is_enabled() ||
        at::areAnyTensorSubclassLike({grad_output}) || at::areAnyTensorSubclassLike(inputs) ||
        grad_output._fw_grad(/*level=*/0).defined() || any(defined(tangents_of(inputs)))) {
      return false;
    }
    Tensors<N> gradients;
    size_t edge = N;
    bool any_whole = false;
    for (size_t pair = 0; pair < N / 2; ++pair) {
      const size_t i = 2 * pair;
      const auto& of_mu = this->next_edge(i);
      const auto& of_log_var = this->next_edge(i + 1);
      if (halves[pair] && this->task_should_compute_output(edge++) && wanted[i] && wanted[i + 1] &&
          are_unchanged(inputs[i], inputs[i + 1], of_mu, of_log_var) && !is_observed(*of_mu.function) &&
          !is_observed(*of_log_var.function)) {
        std::tie(result[edge - 1], gradients[i], gradients[i + 1]) = std::tuple_cat(halves[pair]->allocate(inputs[i]));
        any_whole = true;
      }
    }
    if (!any_whole) {
      return false;
    }
    for (size_t i = 0; i < N; ++i) {
      if (wanted[i] && !gradients[i].defined()) {
        gradients[i] = result[i] = allocate_like(inputs[i]);
      }
    }
    this->op.backward_out(grad_output, inputs, gradients);
    return true;
  }
};

// The inputs that the gradients of those that require one depend on.
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

template <size_t N>
std::array<bool, N> all_of() {
  std::array<bool, N> flags;
  flags.fill(true);
  return flags;
}

template <class Op, size_t N = Op::kInputs>
at::Tensor forward(const Op& op, const Tensors<N>& inputs, std::optional<at::ScalarType> dtype) {
  check_tensors(Op::kForwardName, named(Op::kArguments, inputs));
  check_clamp(Op::kForwardName, op.clamp_min, op.clamp_max);
  check_result_dtype(Op::kForwardName, dtype);
  at::Tensor result = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op.forward(inputs, dtype);
  }();
  if (any_requires_grad(inputs)) {
    auto node = make_node<Backward<Op>>(inputs);
    node->op = op;
    // All of them where one is jagged: what stands in for an input that is not saved cannot be given a ragged shape.
    const bool any_jagged =
        std::any_of(inputs.begin(), inputs.end(), [](const at::Tensor& input) { return input.layout() == at::kJagged; });
    const auto needed = any_jagged ? all_of<N>() : needed_by_gradients<Op>(inputs);
    node->save(inputs, needed);
    node->add_edges_of_halves(inputs);
    if (op.needs_shapes() && needed != all_of<N>()) {
      const auto shape = shape_of_terms(op, result, inputs);
      node->shape.assign(shape.begin(), shape.end());
    }
    set_history(Tensors<1>{result}, node);
  }
  const auto tangents = tangents_of(inputs);
  if (any(defined(tangents))) {
    const auto shape = shape_of_terms(op, result, inputs);
    result._set_fw_grad(directional(op, primals_of(inputs), tangents, shape, result.options()),
                        /*level=*/0, /*is_inplace_op=*/false);
  }
  return result;
}

template <class Op, size_t N = Op::kInputs>
Tensors<N> backward(const Op& op, const at::Tensor& grad_output, const Tensors<N>& inputs, const std::array<bool, N>& mask) {
  Tensors<N + 1> tensors{grad_output};
  std::copy(inputs.begin(), inputs.end(), tensors.begin() + 1);
  std::array<const char*, N + 1> names{"grad_output"};
  std::copy(Op::kArguments.begin(), Op::kArguments.end(), names.begin() + 1);
  check_tensors(Op::kBackwardName, named(names, tensors));
  check_clamp(Op::kBackwardName, op.clamp_min, op.clamp_max);
  Tensors<N> gradients = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op.backward(grad_output, inputs, mask);
  }();
  if (any_requires_grad(tensors)) {
    auto node = make_node<BackwardBackward<Op>>(tensors);
    node->op = op;
    node->save(tensors, all_of<N + 1>());
    set_history(gradients, node);
  }
  const at::Tensor grad_tangent = grad_output._fw_grad(/*level=*/0);
  const auto tangents = tangents_of(inputs);
  if (grad_tangent.defined() || any(defined(tangents))) {
    const auto primals = primals_of(inputs);
    Tensors<N> from_inputs;
    if (any(defined(tangents))) {
      const auto shape = shape_of_terms(op, grad_output, inputs);
      from_inputs = second_order(op, grad_output._fw_primal(/*level=*/0), primals, tangents, mask, shape);
    }
    Tensors<N> from_grad;
    if (grad_tangent.defined()) {
      from_grad = op.backward(grad_tangent, primals, mask);
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

// What has no derivatives: as torch's own operators with an out argument.
template <class Op, size_t N = Op::kInputs>
void backward_out(const Op& op, const at::Tensor& grad_output, const Tensors<N>& inputs, const Tensors<N>& gradients) {
  const bool records = any_requires_grad(Tensors<1>{grad_output}) || any_requires_grad(inputs) || any_requires_grad(gradients);
  TORCH_CHECK(!records, Op::kBackwardName, ": expected no tensor to require grad where gradients are given, which are not ",
              "differentiated");
  const at::AutoDispatchBelowADInplaceOrView guard;
  op.backward_out(grad_output, inputs, gradients);
}

} // namespace kl_ext::autograd
