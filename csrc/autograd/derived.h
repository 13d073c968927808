// Directional and second derivatives of a call, in differentiable operators.
#pragma once

#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>

#include "../plan.h"
#include "../reduction.h"
#include "formulas.h"

namespace kl_ext::autograd {

inline at::Tensor sum_of(const at::Tensor& a, const at::Tensor& b) { return !a.defined() ? b : !b.defined() ? a : a + b; }

// Derives from the inputs and the weight of a call, and its options.
class Derived {
 public:
  // tensors: the inputs and the weight.
  Derived(const Options& options, const Tensors& tensors) : options_(options) {
    const size_t inputs = tensors.size() - (options.has_weight ? 1 : 0);
    inputs_.assign(tensors.begin(), tensors.begin() + inputs);
    weight_ = options.has_weight ? tensors.back() : at::Tensor();
  }

  // The shape of grad_output, unless it is reduced: then all inputs are available to compute the shape from.
  c10::SymDimVector shape_of_terms(const at::Tensor& grad_output) const {
    c10::SymDimVector shape((reduces() ? inputs_[0] : grad_output).sym_sizes());
    for (const auto& input : inputs_) {
      shape = at::infer_size_symdimvector(shape, input.sym_sizes());
    }
    return shape;
  }

  // The derivative of the result in the direction v: the sum over i of v_i dterm/dinput_i, reduced like the terms. `like` is a
  // tensor of the result's dtype and device.
  at::Tensor directional(const Tensors& v, const at::Tensor& like) const {
    const auto shape = shape_of_terms(like);
    const auto arithmetic = arithmetic_type(named(), like.scalar_type());
    Tensors expanded;
    for (const auto& input : inputs_) {
      expanded.push_back(input.to(arithmetic).expand_symint(shape));
    }
    Mask mask{};
    for (size_t i = 0; i < v.size(); ++i) {
      mask[i] = v[i].defined();
    }
    const at::Tensor one = at::ones({}, like.options().dtype(arithmetic)).expand_symint(shape);
    const Gradients derivatives = backward_of_terms(one, expanded, mask);
    at::Tensor sum;
    for (size_t i = 0; i < v.size(); ++i) {
      if (v[i].defined()) {
        sum = sum_of(sum, derivatives[i] * v[i]);
      }
    }
    return reduce(without_left_out(sum, shape), shape, arithmetic).to(like.options());
  }

  // grad_output times the Hessian times v, summed to the shapes of the inputs; undefined where it is zero or not wanted.
  Tensors second_order(const at::Tensor& grad_output, const Tensors& v, const Mask& wanted) const {
    const auto shape = shape_of_terms(grad_output);
    const auto arithmetic = arithmetic_type(named());
    const AnyDerivatives& derivatives = derivatives_of(options_.formula);
    Tensors operands;
    Tensors directions;
    for (size_t i = 0; i < inputs_.size(); ++i) {
      operands.push_back(harmless(inputs_[i].to(arithmetic), derivatives.harmless[i], shape));
      directions.push_back(v[i].defined() ? without_left_out(v[i].to(arithmetic), shape) : at::Tensor());
    }
    at::Tensor grad_terms = unreduce(grad_output.to(arithmetic), shape, arithmetic);
    if (weight_.defined()) {
      grad_terms = without_left_out(grad_terms.expand_symint(shape) * weight_, shape);
    }
    Tensors rows = derivatives.curvature(options_, operands, directions);
    for (size_t i = 0; i < inputs_.size(); ++i) {
      if (rows[i].defined()) {
        rows[i] = wanted[i]
                      ? at::sum_to(grad_terms * rows[i].expand_symint(shape), inputs_[i].sym_sizes()).to(inputs_[i].options())
                      : at::Tensor();
      }
    }
    return rows;
  }

  // The gradients of the inputs from the gradient of the result.
  Gradients backward(const at::Tensor& grad_output, const Mask& mask) const {
    const Tensors all = tensors();
    return options_.op->backward(grad_output, options_.call(all), mask);
  }

 private:
  bool reduces() const { return options_.op->description.reduces; }

  Tensors tensors() const {
    Tensors all = inputs_;
    if (weight_.defined()) {
      all.push_back(weight_);
    }
    return all;
  }

  c10::SmallVector<NamedTensor, kMaxTensors> named() const {
    c10::SmallVector<NamedTensor, kMaxTensors> arguments;
    for (const auto& input : inputs_) {
      arguments.push_back({"input", input});
    }
    if (weight_.defined()) {
      arguments.push_back({"weight", weight_});
    }
    return arguments;
  }

  // The gradients of the inputs from the gradient of each term.
  Gradients backward_of_terms(const at::Tensor& grad_terms, const Tensors& expanded, const Mask& mask) const {
    Tensors all = expanded;
    if (weight_.defined()) {
      all.push_back(weight_);
    }
    Call call = options_.call(all);
    call.reduction = "none";
    call.dim = std::nullopt;
    call.keepdim = false;
    return options_.op->backward(grad_terms, call, mask);
  }

  // The terms with 0 in place of those that the weight leaves out, whatever their inputs and directions are.
  at::Tensor without_left_out(const at::Tensor& terms, c10::SymIntArrayRef shape) const {
    return weight_.defined() ? at::where(weight_ != 0, terms.expand_symint(shape), 0.0) : terms;
  }

  // The input with a harmless number where the weight leaves a term out: a derivative would multiply a NaN there by 0.
  at::Tensor harmless(const at::Tensor& input, double number, c10::SymIntArrayRef shape) const {
    return weight_.defined() ? at::where(weight_ != 0, input.expand_symint(shape), number) : input;
  }

  Reduction reduction(size_t rank) const {
    return parse_reduction(options_.op->description.name, options_.reduction,
                           options_.dim ? at::OptionalIntArrayRef(*options_.dim) : std::nullopt, static_cast<int64_t>(rank));
  }

  static at::DimVector dims_of(const Reduction& reduction) {
    at::DimVector dims;
    for (size_t dim = 0; dim < reduction.reduced.size(); ++dim) {
      if (reduction.reduced[dim]) {
        dims.push_back(static_cast<int64_t>(dim));
      }
    }
    return dims;
  }

  // The sum divided as for a mean, if it is one. keepdim: whether reduced dimensions are kept with size 1.
  at::Tensor quotient_of(const at::Tensor& sum, const Reduction& how, c10::SymIntArrayRef shape, at::ScalarType arithmetic,
                         bool keepdim) const {
    if (!how.divides) {
      return sum;
    }
    if (!how.divides_by_weights(weight_.defined())) {
      return quotient(sum, how.divisor(shape));
    }
    const at::Tensor weights = weight_.to(arithmetic).expand_symint(shape);
    return sum / nan_for_zero(shape.empty() ? weights : at::sum(weights, dims_of(how), keepdim));
  }

  at::Tensor reduce(const at::Tensor& terms, c10::SymIntArrayRef shape, at::ScalarType arithmetic) const {
    if (!reduces()) {
      return terms;
    }
    const Reduction how = reduction(shape.size());
    if (how.is_none) {
      return terms;
    }
    const at::Tensor sum = shape.empty() ? terms : at::sum(terms, dims_of(how), options_.keepdim);
    return quotient_of(sum, how, shape, arithmetic, options_.keepdim);
  }

  // The gradient of the terms, in a shape that broadcasts with them.
  at::Tensor unreduce(const at::Tensor& grad_output, c10::SymIntArrayRef shape, at::ScalarType arithmetic) const {
    if (!reduces()) {
      return grad_output;
    }
    const Reduction how = reduction(shape.size());
    const at::Tensor divided = quotient_of(grad_output, how, shape, arithmetic, options_.keepdim);
    return options_.keepdim ? divided : how.unsqueeze(divided);
  }

  const Options& options_;
  Tensors inputs_;
  at::Tensor weight_;
};

} // namespace kl_ext::autograd
