// The operators where all tensors have one shape, one dtype and contiguous numbers, as most have: no iteration to plan, which
// takes longer than a few thousand elements do, and no buffers. Each function returns nothing where that is not so.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../backend.h"
#include "kernels.h"

namespace kl_ext::cpu {

// Elementwise.
std::optional<at::Tensor> forward_flat(Loss loss, Arguments inputs, Bounds bounds, at::ScalarType result);

// The sum of everything, divided by the divisor, if there is one.
std::optional<at::Tensor> sum_flat(Loss loss, Arguments inputs, Bounds bounds, at::ScalarType result,
                                   std::optional<int64_t> divisor);

// All gradients, from a grad_output that is like the inputs or expanded from a single number. arguments: grad_output first.
std::optional<Gradients> backward_flat(Loss loss, Arguments arguments, Bounds bounds);

} // namespace kl_ext::cpu
