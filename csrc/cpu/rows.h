// The operators where all tensors have one shape, one dtype and the same rows of contiguous numbers: most are one row whole, and
// halves of a tensor, as encoders return them, have rows with gaps between. No iteration to plan, which takes longer than a few
// thousand elements do, and no buffers. Each function says nothing, or false, where that is not so, and has done nothing then.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../backend.h"
#include "kernels.h"

namespace kl_ext::cpu {

// Elementwise.
std::optional<at::Tensor> forward_by_rows(Loss loss, Arguments inputs, Bounds bounds, at::ScalarType result);

// The sum of everything, divided by the divisor, if there is one.
std::optional<at::Tensor> sum_by_rows(Loss loss, Arguments inputs, Bounds bounds, at::ScalarType result,
                                      std::optional<int64_t> divisor);

// All gradients, from a grad_output that has the same rows, or one number for each, or one for all. arguments: grad_output first.
bool backward_by_rows(Loss loss, Arguments arguments, Bounds bounds, const Gradients& gradients);

} // namespace kl_ext::cpu
