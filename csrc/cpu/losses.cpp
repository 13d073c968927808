// The operators on the CPU: which kernel, over what iteration.
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <utility>

#include "../backend.h"
#include "elementwise.h"
#include "reduction.h"
#include "rows.h"

namespace kl_ext::cpu {
namespace {

at::ScalarType dtype_of(Arithmetic arithmetic) { return arithmetic == kDouble ? at::kDouble : at::kFloat; }

// For operands of which the first is the result, and the others the inputs.
GivenQ given_q(Loss loss, Arithmetic arithmetic, bool wide, Bounds bounds) {
  const PrepareQ prepare = kernels().prepare_q[loss][arithmetic];
  return prepare == nullptr || wide ? GivenQ{} : GivenQ{4, prepare, bounds};
}

at::Tensor forward(Loss loss, Arguments inputs, Bounds bounds, at::ScalarType result) {
  if (auto out = forward_by_rows(loss, inputs, bounds, result)) {
    return *std::move(out);
  }
  const Arithmetic arithmetic = arithmetic_of(inputs, result);
  const bool wide = is_wide(bounds, arithmetic);
  const Forward kernel = kernels().forward[loss][wide][storage_of(arithmetic)];
  const Forward kernel_given_q = kernels().forward_given_q[loss][arithmetic];
  const GivenQ given = given_q(loss, arithmetic, wide, bounds);
  auto iterator = plan_forward(inputs, result, at::kCPU);
  for_each_block(iterator, arithmetic, /*whole_rows=*/true, given, [&](void* const* pointers, int64_t numel) {
    (pointers[inputs.size() + 1] != nullptr ? kernel_given_q : kernel)(contiguous(pointers, numel), bounds);
  });
  return iterator.output();
}

// In the order of the sum and with one division, then rounded once.
at::Tensor forward_sum(Loss loss, Arguments inputs, Bounds bounds, at::ScalarType result, at::IntArrayRef shape,
                       const Reduction& reduction) {
  if (auto sums = sum_by_rows(loss, inputs, bounds, result, shape, reduction)) {
    return *std::move(sums);
  }
  const auto divisor = reduction.divides ? std::optional(reduction.divisor(shape)) : std::nullopt;
  const Arithmetic arithmetic = arithmetic_of(inputs, result);
  const bool wide = is_wide(bounds, arithmetic);
  const Forward kernel = kernels().forward[loss][wide][storage_of(arithmetic)];
  const Accumulate accumulate = kernels().accumulate[loss][wide][arithmetic];
  const at::Tensor sums(at::detail::empty_cpu(reduction.kept_shape(shape), result));
  c10::SmallVector<SumOperand, kMaxInputs + 1> operands;
  operands.emplace_back(sums, divisor, shape.size());
  for (const auto& input : inputs) {
    operands.emplace_back(input.tensor, SumOperand::kInput, shape);
  }
  const GivenQ given = given_q(loss, arithmetic, wide, bounds);
  const Forward kernel_given_q = kernels().forward_given_q[loss][arithmetic];
  const Accumulate accumulate_given_q = kernels().accumulate_given_q[loss][arithmetic];
  const auto compute = [&](void* const* pointers, int64_t numel) {
    (pointers[inputs.size() + 1] != nullptr ? kernel_given_q : kernel)(contiguous(pointers, numel), bounds);
  };
  const auto add_terms = [&](void* lanes, void* const* pointers, int first, int64_t numel) {
    (pointers[inputs.size()] != nullptr ? accumulate_given_q : accumulate)(lanes, pointers, first, numel, bounds);
  };
  sum_terms(shape, reduction.reduced, operands, arithmetic, given, compute, add_terms);
  return sums;
}

// A gradient of sums is divided whole where there are so many times as many terms.
constexpr int64_t kLeastShare = 16;

// A gradient kernel over blocks of at most block_numel numbers, with grad_output divided first where there is a divisor: dividing
// it whole could take as much memory as an input.
struct BlockBackward {
  Backward kernel;
  Backward kernel_given_q;
  PrepareQ prepare_q; // with the two, none in a wide range
  Arithmetic arithmetic;
  Bounds bounds;
  size_t inputs;
  std::optional<int64_t> divisor;

  // output(i): where gradient i goes, or null; from first on the pointers are those of grad_output, of the inputs, and of what is
  // prepared of q.
  template <class Output>
  void operator()(void* const* pointers, size_t first, const Output& output, int64_t numel) const {
    alignas(64) char divided[kBlockBytes];
    // The kernels compute every gradient; one that is not wanted stays behind here.
    alignas(64) char scratch[kBlockBytes];
    void* operands[kMaxOperands + 1];
    for (size_t i = 0; i < inputs; ++i) {
      void* const wanted = output(i);
      operands[i] = wanted != nullptr ? wanted : scratch;
    }
    std::copy_n(pointers + first, inputs + 2, operands + inputs);
    if (divisor) {
      std::copy_n(static_cast<const char*>(pointers[first]), numel * size_of(arithmetic), divided);
      kernels().divide[arithmetic](divided, numel, *divisor);
      operands[inputs] = divided;
    }
    (operands[2 * inputs + 1] != nullptr ? kernel_given_q : kernel)(contiguous(operands, numel), bounds);
  }

  // first: the operand that is grad_output.
  GivenQ given(size_t first) const {
    return prepare_q == nullptr ? GivenQ{} : GivenQ{static_cast<int>(first) + 4, prepare_q, bounds};
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
    sum_terms(shape, reduced, operands, kernel.arithmetic, kernel.given(first_input),
              [&](void* const* pointers, int64_t numel) {
                kernel(pointers, first_input, [&](size_t i) { return output[i] >= 0 ? pointers[output[i]] : nullptr; }, numel);
              });
    for (size_t i = 0; i < inputs; ++i) {
      if (sums[i].defined() && !sums[i].is_same(gradients[i])) {
        gradients[i].copy_(sums[i]);
      }
    }
  }
}

// Whether all numbers of a tensor are one.
bool is_one_number(const at::Tensor& tensor) {
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != 0) {
      return false;
    }
  }
  return tensor.numel() > 0;
}

// The first number of grad_output, divided as the kernels do.
double divided_number(const at::Tensor& grad_output, std::optional<int64_t> divisor, Arithmetic arithmetic) {
  const Tile one{1, 1, 0, 0};
  alignas(double) char grad[sizeof(double)];
  kernels().load[storage_of(grad_output.scalar_type())][arithmetic](grad, grad_output.const_data_ptr(), one);
  if (divisor) {
    kernels().divide[arithmetic](grad, 1, *divisor);
  }
  double number = 0;
  kernels().store[kFloat64][arithmetic](&number, grad, one);
  return number;
}

// From a grad_output that is one number, to be divided; all gradients.
bool backward_of_one(Loss loss, const at::Tensor& grad_output, Arguments inputs, Bounds bounds, const Gradients& gradients,
                     at::IntArrayRef shape, std::optional<int64_t> divisor) {
  const Arithmetic arithmetic = arithmetic_of(inputs, grad_output.scalar_type());
  if (arithmetic != arithmetic_of(inputs)) {
    return false;
  }
  return backward_of_one_by_rows(loss, divided_number(grad_output, divisor, arithmetic), inputs, bounds, gradients, shape);
}

// arguments: grad_output in the shape of the terms, to be divided, then the inputs.
void backward_divided(Loss loss, Arguments arguments, Bounds bounds, const Gradients& gradients,
                      std::optional<int64_t> divisor) {
  const auto shape = arguments[0].tensor.sizes();
  const size_t inputs = arguments.size() - 1;
  size_t wanted = 0;
  bool any_broadcast = false;
  for (size_t i = 0; i < inputs; ++i) {
    if (gradients[i].defined()) {
      any_broadcast |= gradients[i].sizes() != shape;
      ++wanted;
    }
  }
  const bool all_wanted = wanted == inputs;
  if (wanted == 0) {
    return;
  }
  if (all_wanted && !divisor) {
    const at::Tensor& grad_output = arguments[0].tensor;
    const bool done = is_one_number(grad_output)
                          ? backward_of_one(loss, grad_output, arguments.slice(1), bounds, gradients, shape, std::nullopt)
                          : backward_by_rows(loss, arguments, bounds, gradients);
    if (done) {
      return;
    }
  }
  const Arithmetic arithmetic = arithmetic_of(arguments);
  const bool wide = is_wide(bounds, arithmetic);
  const BlockBackward kernel{kernels().backward[loss][wide][storage_of(arithmetic)],
                             kernels().backward_given_q[loss][arithmetic],
                             wide ? nullptr : kernels().prepare_q_of_backward[loss][arithmetic],
                             arithmetic,
                             bounds,
                             inputs,
                             divisor};
  if (any_broadcast) {
    backward_sums(kernel, arguments, gradients);
    return;
  }
  auto iterator = plan_backward(arguments, c10::ArrayRef<at::Tensor>(gradients.data(), inputs));
  const bool whole_rows = all_wanted && !divisor;
  for_each_block(iterator, arithmetic, whole_rows, kernel.given(wanted), [&](void* const* pointers, int64_t numel) {
    void* const* next = pointers;
    kernel(pointers, wanted, [&](size_t i) { return gradients[i].defined() ? *next++ : nullptr; }, numel);
  });
}

// The gradient of a sum is that of its terms, divided where it is a mean.
void backward_sum(Loss loss, const at::Tensor& grad_output, Arguments inputs, Bounds bounds, const Gradients& gradients,
                  at::IntArrayRef shape, const Reduction& reduction) {
  auto divisor = reduction.divides ? std::optional(reduction.divisor(shape)) : std::nullopt;
  const bool all_wanted = std::all_of(gradients.begin(), gradients.begin() + inputs.size(),
                                      [](const at::Tensor& gradient) { return gradient.defined(); });
  if (all_wanted && is_one_number(grad_output) &&
      backward_of_one(loss, grad_output, inputs, bounds, gradients, shape, divisor)) {
    return;
  }
  at::Tensor grad = grad_output;
  const bool is_small = kLeastShare * grad.numel() <= c10::multiply_integers(shape);
  if (divisor && (is_small || grad.numel() == 1)) { // once for all blocks
    const Arithmetic arithmetic = arithmetic_of(inputs, grad.scalar_type());
    grad = grad.to(dtype_of(arithmetic), /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous);
    kernels().divide[arithmetic](grad.data_ptr(), grad.numel(), *std::exchange(divisor, std::nullopt));
  }
  grad = reduction.expand(grad, shape);
  c10::SmallVector<Argument, kMaxInputs + 1> arguments{{"grad_output", grad}};
  arguments.append(inputs.begin(), inputs.end());
  backward_divided(loss, arguments, bounds, gradients, divisor);
}

void backward(Loss loss, Arguments arguments, Bounds bounds, const Gradients& gradients) {
  backward_divided(loss, arguments, bounds, gradients, std::nullopt);
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
