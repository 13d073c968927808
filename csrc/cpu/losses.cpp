// The operators on the CPU: which kernel, over what iteration.
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <utility>

#include "../backend.h"
#include "elementwise.h"
#include "flat.h"
#include "reduction.h"

namespace kl_ext::cpu {
namespace {

at::ScalarType dtype_of(Arithmetic arithmetic) { return arithmetic == kDouble ? at::kDouble : at::kFloat; }

at::Tensor forward(Loss loss, Arguments inputs, Bounds bounds, at::ScalarType result) {
  if (auto flat = forward_flat(loss, inputs, bounds, result)) {
    return *std::move(flat);
  }
  const Arithmetic arithmetic = arithmetic_of(inputs, result);
  const Forward kernel = kernels().forward[loss][is_wide(bounds, arithmetic)][storage_of(arithmetic)];
  auto iterator = plan_forward(inputs, result, at::kCPU);
  prefer_huge_pages(iterator.output());
  for_each_block(iterator, arithmetic, /*whole_rows=*/true,
                 [&](void* const* pointers, int64_t numel) { kernel(pointers[0], pointers + 1, numel, bounds); });
  return iterator.output();
}

// In the order of the sum and with one division, then rounded once.
at::Tensor forward_sum(Loss loss, Arguments inputs, Bounds bounds, at::ScalarType result, at::IntArrayRef shape,
                       const Reduction& reduction) {
  const auto divisor = reduction.divides ? std::optional(reduction.divisor(shape)) : std::nullopt;
  const auto kept = reduction.kept_shape(shape);
  if (kept.empty()) {
    if (auto flat = sum_flat(loss, inputs, bounds, result, divisor)) {
      return *std::move(flat);
    }
  }
  const Arithmetic arithmetic = arithmetic_of(inputs, result);
  const bool wide = is_wide(bounds, arithmetic);
  const Forward kernel = kernels().forward[loss][wide][storage_of(arithmetic)];
  const Accumulate accumulate = kernels().accumulate[loss][wide][arithmetic];
  const at::Tensor sums(at::detail::empty_cpu(kept, result));
  c10::SmallVector<SumOperand, kMaxInputs + 1> operands;
  operands.emplace_back(sums, divisor, shape.size());
  for (const auto& input : inputs) {
    operands.emplace_back(input.tensor, SumOperand::kInput, shape);
  }
  const auto compute = [&](void* const* pointers, int64_t numel) { kernel(pointers[0], pointers + 1, numel, bounds); };
  const auto add_terms = [&](void* lanes, void* const* pointers, int first, int64_t numel) {
    accumulate(lanes, pointers, first, numel, bounds);
  };
  sum_terms(shape, reduction.reduced, operands, arithmetic, compute, add_terms);
  return sums;
}

// A gradient kernel over blocks of at most block_numel numbers, with grad_output divided first where there is a divisor:
// dividing it whole could take as much memory as an input.
struct BlockBackward {
  Backward kernel;
  Arithmetic arithmetic;
  Bounds bounds;
  std::optional<int64_t> divisor;

  void operator()(void* const* gradients, const void* grad_output, void* const* inputs, int64_t numel) const {
    alignas(64) char divided[kBlockBytes];
    if (divisor) {
      std::copy_n(static_cast<const char*>(grad_output), numel * size_of(arithmetic), divided);
      kernels().divide[arithmetic](divided, numel, *divisor);
      grad_output = divided;
    }
    kernel(gradients, grad_output, inputs, numel, bounds);
  }
};

// The gradients of broadcast inputs are summed in the pass that computes them: one pass for each way of being broadcast, of
// which there is hardly ever more than one; what is elementwise is written in the first.
void backward_sums(const BlockBackward& kernel, Arguments arguments, const Gradients& gradients) {
  const auto shape = arguments[0].tensor.sizes();
  const size_t inputs = arguments.size() - 1;
  std::array<bool, kMaxInputs> done{};
  for (size_t leader = 0; leader < inputs; ++leader) {
    const auto reduced = broadcast_dims(arguments[leader + 1].tensor.sizes(), shape);
    const bool is_elementwise = std::find(reduced.begin(), reduced.end(), true) == reduced.end();
    if (!gradients[leader].defined() || done[leader] || is_elementwise) {
      continue;
    }
    c10::SmallVector<SumOperand, 2 * kMaxInputs + 1> operands;
    std::array<int, kMaxInputs> output{-1, -1, -1, -1};
    std::array<at::Tensor, kMaxInputs> sums;
    for (size_t i = 0; i < inputs; ++i) {
      if (!gradients[i].defined() || done[i]) {
        continue;
      }
      if (gradients[i].sizes() == shape) {
        output[i] = static_cast<int>(operands.size());
        operands.emplace_back(gradients[i], SumOperand::kElementwiseOutput, shape);
        done[i] = true;
      } else if (broadcast_dims(gradients[i].sizes(), shape) == reduced) {
        output[i] = static_cast<int>(operands.size());
        sums[i] = gradients[i].is_contiguous() ? gradients[i] : at::empty(gradients[i].sizes(), gradients[i].options());
        operands.emplace_back(sums[i], std::nullopt, shape.size());
        done[i] = true;
      }
    }
    const size_t first_input = operands.size();
    for (const auto& argument : arguments) {
      operands.emplace_back(argument.tensor, SumOperand::kInput, shape);
    }
    sum_terms(shape, reduced, operands, kernel.arithmetic, [&](void* const* pointers, int64_t numel) {
      alignas(64) char scratch[kBlockBytes];
      void* results[kMaxInputs];
      for (size_t i = 0; i < inputs; ++i) {
        results[i] = output[i] >= 0 ? pointers[output[i]] : scratch;
      }
      kernel(results, pointers[first_input], pointers + first_input + 1, numel);
    });
    for (size_t i = 0; i < inputs; ++i) {
      if (sums[i].defined() && !sums[i].is_same(gradients[i])) {
        gradients[i].copy_(sums[i]);
      }
    }
  }
}

// arguments: grad_output in the shape of the terms, to be divided, then the inputs.
Gradients backward_divided(Loss loss, Arguments arguments, Bounds bounds, Mask output_mask, std::optional<int64_t> divisor) {
  if (!divisor && std::find(output_mask.begin(), output_mask.end(), false) == output_mask.end()) {
    if (auto flat = backward_flat(loss, arguments, bounds)) {
      return *std::move(flat);
    }
  }
  const auto shape = arguments[0].tensor.sizes();
  Gradients gradients;
  int wanted = 0;
  bool any_broadcast = false;
  for (size_t i = 0; i < output_mask.size(); ++i) {
    if (output_mask[i]) {
      gradients[i] = at::empty_like(arguments[i + 1].tensor);
      prefer_huge_pages(gradients[i]);
      any_broadcast |= gradients[i].sizes() != shape;
      ++wanted;
    }
  }
  if (wanted == 0) {
    return gradients;
  }
  const Arithmetic arithmetic = arithmetic_of(arguments);
  const BlockBackward kernel{kernels().backward[loss][is_wide(bounds, arithmetic)][storage_of(arithmetic)], arithmetic, bounds,
                             divisor};
  if (any_broadcast) {
    backward_sums(kernel, arguments, gradients);
    return gradients;
  }
  auto iterator = plan_backward(arguments, c10::ArrayRef<at::Tensor>(gradients.data(), output_mask.size()));
  const bool whole_rows = wanted == static_cast<int>(output_mask.size()) && !divisor;
  for_each_block(iterator, arithmetic, whole_rows, [&](void* const* pointers, int64_t numel) {
    // The kernels compute every gradient; one that is not wanted stays behind in a scratch block.
    alignas(64) char scratch[kBlockBytes];
    void* results[kMaxInputs];
    int output = 0;
    for (size_t i = 0; i < output_mask.size(); ++i) {
      results[i] = output_mask[i] ? pointers[output++] : scratch;
    }
    kernel(results, pointers[wanted], pointers + wanted + 1, numel);
  });
  return gradients;
}

// The gradient of a sum is that of its terms, divided where it is a mean.
Gradients backward_sum(Loss loss, const at::Tensor& grad_output, Arguments inputs, Bounds bounds, Mask output_mask,
                       at::IntArrayRef shape, const Reduction& reduction) {
  at::Tensor grad = grad_output;
  auto divisor = reduction.divides ? std::optional(reduction.divisor(shape)) : std::nullopt;
  if (divisor && grad.numel() == 1) { // once for all blocks
    const Arithmetic arithmetic = arithmetic_of(inputs, grad.scalar_type());
    grad = grad.to(dtype_of(arithmetic), /*non_blocking=*/false, /*copy=*/true);
    kernels().divide[arithmetic](grad.data_ptr(), 1, *std::exchange(divisor, std::nullopt));
  }
  grad = reduction.unsqueeze(grad).expand(shape);
  c10::SmallVector<Argument, kMaxInputs + 1> arguments{{"grad_output", grad}};
  arguments.append(inputs.begin(), inputs.end());
  return backward_divided(loss, arguments, bounds, output_mask, divisor);
}

Gradients backward(Loss loss, Arguments arguments, Bounds bounds, Mask output_mask) {
  return backward_divided(loss, arguments, bounds, output_mask, std::nullopt);
}

struct Backend {
  using Loss = cpu::Loss;
  static constexpr Loss kSingleLoss = cpu::kSingleLoss;
  static constexpr Loss kPairLoss = cpu::kPairLoss;
  static constexpr Loss kDivergence = cpu::kDivergence;
  static constexpr auto forward = cpu::forward;
  static constexpr auto forward_sum = cpu::forward_sum;
  static constexpr auto backward = cpu::backward;
  static constexpr auto backward_sum = cpu::backward_sum;
};

TORCH_LIBRARY_IMPL(kl_ext, CPU, m) { Operators<Backend>::register_in(m); }

} // namespace
} // namespace kl_ext::cpu
