// The operators on the CPU: which kernel runs in which iteration.
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <utility>

#include "../backend.h"
#include "../signature.h"
#include "elementwise.h"
#include "reduction.h"
#include "rows.h"

namespace kl_ext::cpu {
namespace {

at::ScalarType dtype_of(Arithmetic arithmetic) { return arithmetic == kDouble ? at::kDouble : at::kFloat; }

// Copies the inputs of a block for the kernels that are given q: the inputs, what is prepared from q, the weight.
void copy_inputs(void** to, void* const* operands, const Terms& terms, const void* prepared_q) {
  to = std::copy_n(operands, terms.inputs(), to);
  if (prepared_q != nullptr) {
    *to++ = const_cast<void*>(prepared_q);
  }
  if (terms.is_weighted) {
    *to = operands[terms.inputs()];
  }
}

// The kernels of a forward pass, block by block.
struct BlockForward {
  BlockForward(const Terms& of, Arithmetic in)
      : terms(of), arithmetic(in), kernels(kernels_of(of)), wide(is_wide(of.settings, in)) {}

  // operands: the result, the inputs and the weight.
  void operator()(void* const* operands, const void* prepared_q, int64_t numel) const {
    if (prepared_q == nullptr) {
      kernels.forward[wide][storage_of(arithmetic)](contiguous(operands, numel), terms.settings);
      return;
    }
    void* given[kMaxOperands] = {operands[0]};
    copy_inputs(given + 1, operands + 1, terms, prepared_q);
    kernels.forward_given_q[arithmetic](contiguous(given, numel), terms.settings);
  }

  void add_terms(void* lanes, void* const* inputs, const void* prepared_q, int first, int64_t numel) const {
    if (prepared_q == nullptr) {
      kernels.accumulate[wide][arithmetic](lanes, inputs, first, numel, terms.settings);
      return;
    }
    void* given[kMaxOperands];
    copy_inputs(given, inputs, terms, prepared_q);
    kernels.accumulate_given_q[arithmetic](lanes, given, first, numel, terms.settings);
  }

  // For an iteration with the result as operand 0, followed by the inputs.
  GivenQ given_q() const {
    const PrepareQ prepare = cpu::kernels().formulas[terms.formula].prepare_q[arithmetic];
    return prepare == nullptr || wide ? GivenQ{} : GivenQ{4, prepare, terms.settings};
  }

  const Terms& terms;
  Arithmetic arithmetic;
  const FormulaKernels& kernels;
  bool wide;
};

at::Tensor forward(const Terms& terms, at::ScalarType result) {
  if (auto out = forward_by_rows(terms, result)) {
    return *std::move(out);
  }
  const Arithmetic arithmetic = arithmetic_of(terms.operands, result);
  const BlockForward compute(terms, arithmetic);
  auto iterator = plan_forward(terms.operands, result, at::kCPU);
  for_each_block(iterator, arithmetic, /*whole_rows=*/true, compute.given_q(), compute);
  return iterator.output();
}

// Sums in the defined order, divides once, then rounds once.
at::Tensor forward_sum(const Terms& terms, at::ScalarType result, at::IntArrayRef shape, const Reduction& reduction) {
  if (auto sums = sum_by_rows(terms, result, shape, reduction)) {
    return *std::move(sums);
  }
  const auto divisor = reduction.divides ? std::optional(reduction.divisor(shape)) : std::nullopt;
  const Arithmetic arithmetic = arithmetic_of(terms.operands, result);
  const BlockForward compute(terms, arithmetic);
  const at::Tensor sums(at::detail::empty_cpu(reduction.kept_shape(shape), result));
  c10::SmallVector<SumOperand, kMaxInputs + 2> operands;
  operands.emplace_back(sums, divisor, shape.size());
  for (const auto& operand : terms.operands) {
    operands.emplace_back(operand.tensor, SumOperand::kInput, shape);
  }
  const auto add_terms = [&](void* lanes, void* const* inputs, const void* prepared_q, int first, int64_t numel) {
    compute.add_terms(lanes, inputs, prepared_q, first, numel);
  };
  sum_terms(shape, reduction.reduced, operands, arithmetic, compute.given_q(), compute, add_terms);
  return sums;
}

// The grad_output of a sum is divided as a whole if there are at least this many terms for each of its numbers.
constexpr int64_t kLeastShare = 16;

// A gradient kernel over blocks of at most block_numel numbers. If there is a divisor, it divides grad_output block by block:
// the whole quotient could take as much memory as an input.
struct BlockBackward {
  BlockBackward(const Terms& of, Arithmetic in, std::optional<int64_t> by)
      : terms(of), arithmetic(in), kernels(kernels_of(of)), wide(is_wide(of.settings, in)), divisor(by) {}

  // output(i): where gradient i goes, or null. operands: grad_output, the inputs and the weight.
  template <class Output>
  void operator()(const Output& output, void* const* operands, const void* prepared_q, int64_t numel) const {
    alignas(64) char divided[kBlockBytes];
    // The kernels compute every gradient; those that are not wanted go here.
    alignas(64) char scratch[kBlockBytes];
    void* all[kMaxOperands];
    const size_t gradients = terms.inputs();
    for (size_t i = 0; i < gradients; ++i) {
      void* const wanted = output(i);
      all[i] = wanted != nullptr ? wanted : scratch;
    }
    all[gradients] = operands[0];
    if (divisor) {
      std::copy_n(static_cast<const char*>(operands[0]), numel * size_of(arithmetic), divided);
      cpu::kernels().divide[arithmetic](divided, numel, *divisor);
      all[gradients] = divided;
    }
    copy_inputs(all + gradients + 1, operands + 1, terms, prepared_q);
    const BackwardKernel kernel =
        prepared_q != nullptr ? kernels.backward_given_q[arithmetic] : kernels.backward[wide][storage_of(arithmetic)];
    kernel(contiguous(all, numel), terms.settings);
  }

  // grad_output: its index among the operands.
  GivenQ given_q(size_t grad_output) const {
    const PrepareQ prepare = cpu::kernels().formulas[terms.formula].prepare_q_of_backward[arithmetic];
    return prepare == nullptr || wide ? GivenQ{} : GivenQ{static_cast<int>(grad_output) + 4, prepare, terms.settings};
  }

  const Terms& terms;
  Arithmetic arithmetic;
  const FormulaKernels& kernels;
  bool wide;
  std::optional<int64_t> divisor;
};

// One pass that sums some of the gradients.
void run_pass(const SumPass& pass, const BlockBackward& kernel, const at::Tensor& grad_output, const Gradients& gradients) {
  const auto shape = grad_output.sizes();
  c10::SmallVector<SumOperand, kMaxOperands> operands;
  std::array<int, kMaxInputs> output{-1, -1, -1, -1};
  SumTargets targets;
  for (size_t i = 0; i < kMaxInputs; ++i) {
    if (pass.roles[i] == SumPass::kAbsent) {
      continue;
    }
    output[i] = static_cast<int>(operands.size());
    if (pass.roles[i] == SumPass::kElementwise) {
      operands.emplace_back(gradients[i], SumOperand::kElementwiseOutput, shape);
    } else {
      operands.emplace_back(targets.add(gradients[i]), std::nullopt, shape.size());
    }
  }
  const size_t outputs = operands.size();
  operands.emplace_back(grad_output, SumOperand::kInput, shape);
  for (const auto& operand : kernel.terms.operands) {
    operands.emplace_back(operand.tensor, SumOperand::kInput, shape);
  }
  sum_terms(shape, pass.reduced, operands, kernel.arithmetic, kernel.given_q(outputs),
            [&](void* const* pointers, const void* prepared_q, int64_t numel) {
              kernel([&](size_t i) { return output[i] >= 0 ? pointers[output[i]] : nullptr; }, pointers + outputs, prepared_q,
                     numel);
            });
  targets.hand_over();
}

// Whether all elements of a tensor are one number in memory.
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

bool are_all_wanted(const Terms& terms, const Gradients& gradients) {
  return std::all_of(gradients.begin(), gradients.begin() + terms.inputs(),
                     [](const at::Tensor& gradient) { return gradient.defined(); });
}

// Computes all gradients from a grad_output that is one number, yet to be divided.
bool backward_of_one(const Terms& terms, const at::Tensor& grad_output, const Gradients& gradients, at::IntArrayRef shape,
                     std::optional<int64_t> divisor) {
  const Arithmetic arithmetic = arithmetic_of(terms.operands, grad_output.scalar_type());
  if (terms.is_weighted || arithmetic != arithmetic_of(terms.operands)) {
    return false;
  }
  return backward_of_one_by_rows(terms, divided_number(grad_output, divisor, arithmetic), gradients, shape);
}

// grad_output: in the shape of the terms, yet to be divided.
void backward_divided(const Terms& terms, const at::Tensor& grad_output, const Gradients& gradients,
                      std::optional<int64_t> divisor) {
  const auto shape = grad_output.sizes();
  size_t wanted = 0;
  for (size_t i = 0; i < terms.inputs(); ++i) {
    wanted += gradients[i].defined() ? 1 : 0;
  }
  if (wanted == 0) {
    return;
  }
  const bool all_wanted = wanted == terms.inputs();
  if (all_wanted && !divisor) {
    const bool done = is_one_number(grad_output) ? backward_of_one(terms, grad_output, gradients, shape, std::nullopt)
                                                 : backward_by_rows(terms, grad_output, gradients);
    if (done) {
      return;
    }
  }
  const Arithmetic arithmetic = arithmetic_of(terms.operands, grad_output.scalar_type());
  const BlockBackward kernel(terms, arithmetic, divisor);
  const auto passes = sum_passes(terms.operands.slice(0, terms.inputs()), gradients, shape);
  for (const SumPass& pass : passes) {
    run_pass(pass, kernel, grad_output, gradients);
  }
  if (!passes.empty()) {
    return;
  }
  auto iterator = plan_backward(grad_output, terms.operands, c10::ArrayRef<at::Tensor>(gradients.data(), terms.inputs()));
  const bool whole_rows = all_wanted && !divisor;
  for_each_block(iterator, arithmetic, whole_rows, kernel.given_q(wanted),
                 [&](void* const* pointers, const void* prepared_q, int64_t numel) {
                   void* const* next = pointers;
                   kernel([&](size_t i) { return gradients[i].defined() ? *next++ : nullptr; }, pointers + wanted, prepared_q,
                          numel);
                 });
}

// The gradient of a sum is that of its terms, divided where it is a mean.
void backward_sum(const Terms& terms, const at::Tensor& grad_output, const Gradients& gradients, at::IntArrayRef shape,
                  const Reduction& reduction) {
  auto divisor = reduction.divides ? std::optional(reduction.divisor(shape)) : std::nullopt;
  if (are_all_wanted(terms, gradients) && is_one_number(grad_output) &&
      backward_of_one(terms, grad_output, gradients, shape, divisor)) {
    return;
  }
  at::Tensor grad = grad_output;
  const bool is_small = kLeastShare * grad.numel() <= c10::multiply_integers(shape);
  if (divisor && (is_small || grad.numel() == 1)) { // once for all blocks
    const Arithmetic arithmetic = arithmetic_of(terms.operands, grad.scalar_type());
    grad = grad.to(dtype_of(arithmetic), /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous);
    kernels().divide[arithmetic](grad.data_ptr(), grad.numel(), *std::exchange(divisor, std::nullopt));
  }
  backward_divided(terms, reduction.expand(grad, shape), gradients, divisor);
}

void backward(const Terms& terms, const at::Tensor& grad_output, const Gradients& gradients) {
  backward_divided(terms, grad_output, gradients, std::nullopt);
}

struct Backend {
  static constexpr auto forward = cpu::forward;
  static constexpr auto forward_sum = cpu::forward_sum;
  static constexpr auto backward = cpu::backward;
  static constexpr auto backward_sum = cpu::backward_sum;
};

TORCH_LIBRARY_IMPL(kl_ext, CPU, m) { register_layer<Layer<Backend>>(m); }

} // namespace
} // namespace kl_ext::cpu
