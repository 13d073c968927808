// The operators for tensors of one dtype with common rows of contiguous numbers: most tensors are a single row, halves of a
// tensor, as encoders return them, have rows with gaps between, and a prior is one row that all share. This needs no buffers
// and no TensorIterator, whose planning takes longer than a few thousand elements do. For other tensors each function returns
// nullopt or false and has no effect.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../backend.h"
#include "../reduction.h"
#include "kernels.h"

namespace kl_ext::cpu {

// The terms of inputs that all have one shape.
std::optional<at::Tensor> forward_by_rows(const Terms& terms, at::ScalarType result);

// The sum of everything or over the last dimensions, divided for a mean, weighted or not. shape: of the terms.
std::optional<at::Tensor> sum_by_rows(const Terms& terms, at::ScalarType result, at::IntArrayRef shape,
                                      const Reduction& reduction);

// All gradients, of one shape, from a grad_output that has the same rows or one number for each row.
bool backward_by_rows(const Terms& terms, const at::Tensor& grad_output, const Gradients& gradients);

// All gradients, from one grad_output for all terms.
bool backward_of_one_by_rows(const Terms& terms, double grad_output, const Gradients& gradients, at::IntArrayRef shape);

} // namespace kl_ext::cpu
