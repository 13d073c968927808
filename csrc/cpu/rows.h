// The operators where tensors of one dtype have rows of contiguous numbers in common: most are one row whole, halves of a tensor,
// as encoders return them, have rows with gaps between, and a prior is one row that all share. No iteration to plan, which takes
// longer than a few thousand elements do, and no buffers. Each function says nothing, or false, where that is not so, and has
// done nothing then.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../backend.h"
#include "../reduction.h"
#include "kernels.h"

namespace kl_ext::cpu {

// Elementwise, of one shape.
std::optional<at::Tensor> forward_by_rows(const Terms& terms, at::ScalarType result);

// The sum of everything, or over the last dimensions, divided; weighted ones too. shape: of the terms.
std::optional<at::Tensor> sum_by_rows(const Terms& terms, at::ScalarType result, at::IntArrayRef shape,
                                      const Reduction& reduction);

// All gradients of one shape, from a grad_output that has the same rows, or one number for each.
bool backward_by_rows(const Terms& terms, const at::Tensor& grad_output, const Gradients& gradients);

// All gradients, from one grad_output for all terms.
bool backward_of_one_by_rows(const Terms& terms, double grad_output, const Gradients& gradients, at::IntArrayRef shape);

} // namespace kl_ext::cpu
