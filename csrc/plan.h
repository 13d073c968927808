// From the arguments of an operator to an iteration over them: dtypes, the result's layout, and torch's own TensorIterator,
// which broadcasts, orders and merges dimensions. One plan for CPU and CUDA alike.
#pragma once

#include <ATen/ExpandUtils.h>
#include <ATen/TensorIterator.h>
#include <ATen/native/TypeProperties.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "checks.h"

namespace kl_ext {

// float64 if any tensor is, else float32.
inline at::ScalarType arithmetic_type(Arguments arguments, at::ScalarType dtype = at::kFloat) {
  for (const auto& argument : arguments) {
    dtype = argument.tensor.scalar_type() == at::kDouble ? at::kDouble : dtype;
  }
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// torch's promotion.
inline at::ScalarType result_type(Arguments arguments) {
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

// Operand 0 is the result, allocated here with the strides that a pointwise operator of torch gives it.
inline at::TensorIterator plan_forward(Arguments inputs, at::ScalarType dtype, at::Device device) {
  at::TensorIteratorConfig config;
  config.set_check_mem_overlap(false).check_all_same_dtype(false);
  config.declare_static_dtype_and_device(dtype, device);
  config.add_owned_output(at::Tensor());
  for (const auto& input : inputs) {
    config.add_const_input(input.tensor);
  }
  return config.build();
}

// The gradients an operator was asked for. Each is written where it belongs if its input has the shape of grad_output, else in
// full and summed afterwards.
template <size_t kInputs>
struct Gradients {
  std::array<at::Tensor, kInputs> result;
  std::array<at::Tensor, kInputs> full;
};

template <size_t kInputs>
Gradients<kInputs> allocate_gradients(Arguments arguments, const std::array<bool, kInputs>& output_mask) {
  const auto& grad_output = arguments[0].tensor;
  Gradients<kInputs> gradients;
  for (size_t i = 0; i < kInputs; ++i) {
    const auto& input = arguments[i + 1].tensor;
    if (output_mask[i]) {
      gradients.result[i] = at::empty_like(input);
      gradients.full[i] = input.sizes() == grad_output.sizes()
                              ? gradients.result[i]
                              : at::empty(grad_output.sizes(), grad_output.options().dtype(arithmetic_type(arguments)));
    }
  }
  return gradients;
}

// Operands: the wanted gradients, grad_output, the inputs.
template <size_t kInputs>
at::TensorIterator plan_backward(Arguments arguments, const Gradients<kInputs>& gradients) {
  at::TensorIteratorConfig config;
  config.set_check_mem_overlap(false).check_all_same_dtype(false).resize_outputs(false);
  for (const auto& gradient : gradients.full) {
    if (gradient.defined()) {
      config.add_output(gradient);
    }
  }
  for (const auto& argument : arguments) {
    config.add_const_input(argument.tensor);
  }
  return config.build();
}

// Sums over the dimensions along which an input was broadcast, in the arithmetic type, and rounds once.
template <size_t kInputs>
void reduce_gradients(Gradients<kInputs>& gradients) {
  for (size_t i = 0; i < kInputs; ++i) {
    auto& result = gradients.result[i];
    if (result.defined() && !result.is_same(gradients.full[i])) {
      result.copy_(at::sum_to(std::move(gradients.full[i]), result.sizes()));
    }
  }
}

} // namespace kl_ext
