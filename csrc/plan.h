// From the arguments of an operator to an iteration over them: dtypes, the result's layout, and torch's own TensorIterator,
// which broadcasts, orders and merges dimensions. CPU and CUDA share it.
#pragma once

#include <ATen/ExpandUtils.h>
#include <ATen/TensorIterator.h>
#include <ATen/native/TypeProperties.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "checks.h"

namespace kl_ext {

// float64 if any tensor is, else float32.
inline at::ScalarType arithmetic_type(NamedTensors arguments, at::ScalarType dtype = at::kFloat) {
  for (const auto& argument : arguments) {
    dtype = argument.tensor.scalar_type() == at::kDouble ? at::kDouble : dtype;
  }
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// The dtype of the result by torch's type promotion.
inline at::ScalarType result_type(NamedTensors arguments) {
  bool same = true;
  for (const auto& argument : arguments) {
    same &= argument.tensor.scalar_type() == arguments[0].tensor.scalar_type();
  }
  if (same) {
    return arguments[0].tensor.scalar_type();
  }
  at::native::ResultTypeState state;
  for (const auto& argument : arguments) {
    state = at::native::update_result_type_state(argument.tensor, state);
  }
  return at::native::result_type(state);
}

// Operand 0 is the result, allocated here with the strides that a pointwise operator of torch would give it.
inline at::TensorIterator plan_forward(NamedTensors inputs, at::ScalarType dtype, at::Device device) {
  at::TensorIteratorConfig config;
  config.set_check_mem_overlap(false).check_all_same_dtype(false);
  config.declare_static_dtype_and_device(dtype, device);
  config.add_owned_output(at::Tensor());
  for (const auto& input : inputs) {
    config.add_const_input(input.tensor);
  }
  return config.build();
}

// Operands: the gradients that are defined, grad_output, then the other operands, all expanded to one shape.
inline at::TensorIterator plan_backward(const at::Tensor& grad_output, NamedTensors operands, at::TensorList gradients) {
  at::TensorIteratorConfig config;
  config.set_check_mem_overlap(false).check_all_same_dtype(false).resize_outputs(false);
  for (const auto& gradient : gradients) {
    if (gradient.defined()) {
      config.add_output(gradient);
    }
  }
  config.add_const_input(grad_output);
  for (const auto& operand : operands) {
    config.add_const_input(operand.tensor);
  }
  return config.build();
}

} // namespace kl_ext
