// The operators on the CPU: which kernel, over what iteration.
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <utility>

#include "../plan.h"
#include "../reduction.h"
#include "elementwise.h"
#include "flat.h"
#include "reduction.h"

namespace kl_ext::cpu {
namespace {

using Mask = c10::ArrayRef<bool>;

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

// The dimensions of grad_output along which an input is broadcast.
c10::SmallVector<bool, 8> broadcast_dims(at::IntArrayRef input, at::IntArrayRef shape) {
  c10::SmallVector<bool, 8> dims(shape.size(), true);
  for (size_t back = 1; back <= input.size(); ++back) {
    dims[shape.size() - back] = input[input.size() - back] != shape[shape.size() - back];
  }
  return dims;
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
void backward_sums(const BlockBackward& kernel, Arguments arguments, const std::array<at::Tensor, kMaxInputs>& gradients) {
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

// arguments: grad_output in the shape of the terms, then the inputs.
std::array<at::Tensor, kMaxInputs> backward(Loss loss, Arguments arguments, Bounds bounds, Mask output_mask,
                                            std::optional<int64_t> divisor = std::nullopt) {
  if (!divisor && std::find(output_mask.begin(), output_mask.end(), false) == output_mask.end()) {
    if (auto flat = backward_flat(loss, arguments, bounds)) {
      return *std::move(flat);
    }
  }
  const auto shape = arguments[0].tensor.sizes();
  std::array<at::Tensor, kMaxInputs> gradients;
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
    // The kernels compute every gradient; one that is not wanted
    // stays behind in a scratch block.
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

at::Tensor kl_div_single_loss(const at::Tensor& mu, const at::Tensor& log_var, double clamp_min, double clamp_max,
                              std::optional<at::ScalarType> dtype) {
  const Argument inputs[] = {{"mu", mu}, {"log_var", log_var}};
  check_forward("kl_div_single_loss", inputs, clamp_min, clamp_max, dtype);
  return forward(kSingleLoss, inputs, {clamp_min, clamp_max}, dtype.value_or(result_type(inputs)));
}

std::tuple<at::Tensor, at::Tensor> kl_div_single_loss_backward(const at::Tensor& grad_output, const at::Tensor& mu,
                                                               const at::Tensor& log_var, double clamp_min, double clamp_max,
                                                               std::array<bool, 2> output_mask) {
  const Argument arguments[] = {{"grad_output", grad_output}, {"mu", mu}, {"log_var", log_var}};
  check_backward("kl_div_single_loss_backward", arguments, clamp_min, clamp_max);
  auto gradients = backward(kSingleLoss, arguments, {clamp_min, clamp_max}, output_mask);
  return {std::move(gradients[0]), std::move(gradients[1])};
}

at::Tensor kl_div_pair_loss(const at::Tensor& mu_p, const at::Tensor& log_var_p, const at::Tensor& mu_q,
                            const at::Tensor& log_var_q, double clamp_min, double clamp_max,
                            std::optional<at::ScalarType> dtype) {
  const Argument inputs[] = {{"mu_p", mu_p}, {"log_var_p", log_var_p}, {"mu_q", mu_q}, {"log_var_q", log_var_q}};
  check_forward("kl_div_pair_loss", inputs, clamp_min, clamp_max, dtype);
  return forward(kPairLoss, inputs, {clamp_min, clamp_max}, dtype.value_or(result_type(inputs)));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> kl_div_pair_loss_backward(
    const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p, const at::Tensor& mu_q,
    const at::Tensor& log_var_q, double clamp_min, double clamp_max, std::array<bool, 4> output_mask) {
  const Argument arguments[] = {
      {"grad_output", grad_output}, {"mu_p", mu_p}, {"log_var_p", log_var_p}, {"mu_q", mu_q}, {"log_var_q", log_var_q}};
  check_backward("kl_div_pair_loss_backward", arguments, clamp_min, clamp_max);
  return std::tuple_cat(backward(kPairLoss, arguments, {clamp_min, clamp_max}, output_mask));
}

// Calls use(loss, inputs): without q, against the standard normal.
template <class Use>
auto with_inputs(const char* function, const at::Tensor& mu_p, const at::Tensor& log_var_p,
                 const std::optional<at::Tensor>& mu_q, const std::optional<at::Tensor>& log_var_q, const Use& use) {
  check_together(function, mu_q, log_var_q);
  if (!mu_q) {
    const Argument inputs[] = {{"mu_p", mu_p}, {"log_var_p", log_var_p}};
    return use(kSingleLoss, Arguments(inputs));
  }
  const Argument inputs[] = {{"mu_p", mu_p}, {"log_var_p", log_var_p}, {"mu_q", *mu_q}, {"log_var_q", *log_var_q}};
  return use(kDivergence, Arguments(inputs));
}

at::Tensor gaussian_kl_div(const at::Tensor& mu_p, const at::Tensor& log_var_p, const std::optional<at::Tensor>& mu_q,
                           const std::optional<at::Tensor>& log_var_q, double clamp_min, double clamp_max,
                           std::string_view reduction, at::OptionalIntArrayRef dim, std::optional<at::ScalarType> dtype) {
  const char* const function = "gaussian_kl_div";
  return with_inputs(function, mu_p, log_var_p, mu_q, log_var_q, [&](Loss loss, Arguments inputs) {
    check_forward(function, inputs, clamp_min, clamp_max, dtype);
    const at::DimVector shape = broadcast_shape(inputs);
    const Reduction parsed = parse_reduction(function, reduction, dim, static_cast<int64_t>(shape.size()));
    const Bounds bounds{clamp_min, clamp_max};
    const at::ScalarType result = dtype.value_or(result_type(inputs));
    return parsed.is_none ? forward(loss, inputs, bounds, result) : forward_sum(loss, inputs, bounds, result, shape, parsed);
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gaussian_kl_div_backward(
    const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p, const std::optional<at::Tensor>& mu_q,
    const std::optional<at::Tensor>& log_var_q, double clamp_min, double clamp_max, std::string_view reduction,
    at::OptionalIntArrayRef dim, std::array<bool, 4> output_mask) {
  const char* const function = "gaussian_kl_div_backward";
  return with_inputs(function, mu_p, log_var_p, mu_q, log_var_q, [&](Loss loss, Arguments inputs) {
    check_forward(function, inputs, clamp_min, clamp_max, std::nullopt);
    const at::DimVector shape = broadcast_shape(inputs);
    const Reduction parsed = parse_reduction(function, reduction, dim, static_cast<int64_t>(shape.size()));
    check_grad_output(function, {"grad_output", grad_output}, inputs, parsed.kept_shape(at::IntArrayRef(shape)));
    at::Tensor grad = grad_output;
    auto divisor = parsed.divides ? std::optional(parsed.divisor(at::IntArrayRef(shape))) : std::nullopt;
    if (divisor && grad.numel() == 1) { // once for all blocks
      const Arithmetic arithmetic = arithmetic_of(inputs, grad.scalar_type());
      grad = grad.to(dtype_of(arithmetic), /*non_blocking=*/false, /*copy=*/true);
      kernels().divide[arithmetic](grad.data_ptr(), 1, *std::exchange(divisor, std::nullopt));
    }
    grad = parsed.unsqueeze(grad).expand(shape);
    c10::SmallVector<Argument, kMaxInputs + 1> arguments{{"grad_output", grad}};
    arguments.append(inputs.begin(), inputs.end());
    return std::tuple_cat(backward(loss, arguments, {clamp_min, clamp_max}, Mask(output_mask.data(), inputs.size()), divisor));
  });
}

TORCH_LIBRARY_IMPL(kl_ext, CPU, m) {
  m.impl("gaussian_kl_div", gaussian_kl_div);
  m.impl("gaussian_kl_div_backward", gaussian_kl_div_backward);
  m.impl("kl_div_single_loss", kl_div_single_loss);
  m.impl("kl_div_single_loss_backward", kl_div_single_loss_backward);
  m.impl("kl_div_pair_loss", kl_div_pair_loss);
  m.impl("kl_div_pair_loss_backward", kl_div_pair_loss_backward);
}

} // namespace
} // namespace kl_ext::cpu
