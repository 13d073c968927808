// The operators as every backend registers them: Layer checks the arguments and calls the backend. Backend has
//
//   forward(terms, dtype)                                      the terms, in this dtype
//   forward_sum(terms, dtype, shape, reduction)                their sums; shape is the shape of the terms
//   backward(terms, grad_output, gradients)                    with one grad_output for each term
//   backward_sum(terms, grad_output, gradients, shape, reduction)      with one grad_output for each sum
//
// The backend writes into the tensors in gradients; those that are not wanted are undefined.
#pragma once

#include "memory.h"
#include "operators.h"
#include "plan.h"
#include "reduction.h"

namespace kl_ext {

using Settings = math::Settings<double>;

// The terms of a formula.
struct Terms {
  // The number of inputs that may have gradients.
  size_t inputs() const { return operands.size() - (is_weighted ? 1 : 0); }

  int formula; // kFormula of math/formulas.h
  bool is_weighted;
  NamedTensors operands; // the inputs, then the weight
  Settings settings;
  at::Device device;
};

// The dimensions of a shape along which an input is broadcast.
inline c10::SmallVector<bool, 8> broadcast_dims(at::IntArrayRef input, at::IntArrayRef shape) {
  c10::SmallVector<bool, 8> dims(shape.size(), true);
  for (size_t back = 1; back <= input.size(); ++back) {
    dims[shape.size() - back] = input[input.size() - back] != shape[shape.size() - back];
  }
  return dims;
}

// The gradients of broadcast inputs are summed in the pass that computes them. Inputs that are broadcast along different
// dimensions need a pass each, which is rare. The first pass also writes the elementwise gradients.
struct SumPass {
  enum Role { kAbsent, kElementwise, kSummed };

  c10::SmallVector<bool, 8> reduced;
  std::array<Role, kMaxInputs> roles{};
};

inline c10::SmallVector<SumPass, 1> sum_passes(NamedTensors inputs, const Gradients& gradients, at::IntArrayRef shape) {
  c10::SmallVector<SumPass, 1> passes;
  c10::SmallVector<size_t, kMaxInputs> elementwise;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!gradients[i].defined()) {
      continue;
    }
    const auto reduced = broadcast_dims(inputs[i].tensor.sizes(), shape);
    if (std::find(reduced.begin(), reduced.end(), true) == reduced.end()) {
      elementwise.push_back(i);
      continue;
    }
    auto pass = std::find_if(passes.begin(), passes.end(), [&](const SumPass& other) { return other.reduced == reduced; });
    if (pass == passes.end()) {
      passes.push_back({reduced, {}});
      pass = passes.end() - 1;
    }
    pass->roles[i] = SumPass::kSummed;
  }
  for (const size_t i : elementwise) {
    passes.front().roles[i] = SumPass::kElementwise;
  }
  return passes;
}

// The tensors that backends write sums into: always contiguous, and copied to the gradient where that is not.
class SumTargets {
 public:
  const at::Tensor& add(const at::Tensor& gradient) {
    targets_.emplace_back(gradient, gradient.is_contiguous() ? gradient : at::empty(gradient.sizes(), gradient.options()));
    return targets_.back().second;
  }

  void hand_over() const {
    for (const auto& [gradient, sums] : targets_) {
      if (!gradient.is_same(sums)) {
        gradient.copy_(sums);
      }
    }
  }

 private:
  c10::SmallVector<std::pair<at::Tensor, at::Tensor>, kMaxInputs> targets_;
};

template <class Backend>
struct Layer {
  static at::Tensor forward(const Call& call) {
    const Description& d = call.op->description;
    const Checked checked(call, d.name);
    const at::ScalarType result = call.dtype.value_or(result_type(call.tensors));
    if (!d.reduces) {
      return Backend::forward(checked.terms, result);
    }
    const at::IntArrayRef shape = checked.shape;
    const Reduction reduction = parse_reduction(d.name, call.reduction, call.dim, static_cast<int64_t>(shape.size()));
    if (reduction.is_none) {
      return Backend::forward(checked.terms, result);
    }
    at::Tensor sums;
    if (reduction.divides_by_weights(call.has_weight)) {
      const at::ScalarType arithmetic = arithmetic_type(call.tensors, result);
      sums = Backend::forward_sum(checked.terms, arithmetic, shape, reduction.sum());
      sums = sums.div_(sum_of_weights(checked, arithmetic, reduction)).to(result);
    } else {
      sums = Backend::forward_sum(checked.terms, result, shape, reduction);
    }
    return call.keepdim ? sums.view(reduction.kept_shape(shape, true)) : sums;
  }

  static Gradients backward(const at::Tensor& grad_output, const Call& call, Mask mask) {
    const auto allocate_wanted = [&](NamedTensors inputs, NamedTensors, at::IntArrayRef) {
      Destinations to;
      for (size_t i = 0; i < inputs.size(); ++i) {
        if (mask[i]) {
          to.computed[i] = allocate_like(inputs[i].tensor);
        }
      }
      return to;
    };
    return backward_into(grad_output, call, allocate_wanted);
  }

  static void backward_out(const at::Tensor& grad_output, const Call& call, const Gradients& gradients) {
    const auto use_given = [&](NamedTensors inputs, NamedTensors read, at::IntArrayRef shape) {
      Destinations to;
      to.given = gradients;
      check_gradients(call.op->backward_name, inputs, read, gradients, shape);
      for (size_t i = 0; i < inputs.size(); ++i) {
        const at::Tensor& gradient = gradients[i];
        if (gradient.defined()) {
          // A kernel may write a number before it has read all that share its memory, and ignores the negative bit.
          const bool is_beside = gradient.is_neg() || std::any_of(read.begin(), read.end(), [&](const NamedTensor& argument) {
                                   return shares_memory(gradient, argument.tensor);
                                 });
          to.computed[i] = is_beside ? allocate_like(inputs[i].tensor) : gradient;
        }
      }
      return to;
    };
    backward_into(grad_output, call, use_given);
  }

 private:
  // Where gradients are computed, and the caller's tensors for them in backward_out.
  struct Destinations {
    Gradients computed;
    Gradients given;

    void hand_over() const {
      for (size_t i = 0; i < kMaxInputs; ++i) {
        if (given[i].defined() && !given[i].is_same(computed[i])) {
          given[i].copy_(computed[i]);
        }
      }
    }
  };

  // The arguments of a call after all checks.
  struct Checked {
    Checked(const Call& call, const char* function)
        : terms{call.formula(), call.has_weight, call.tensors, settings_of(call), at::kCPU} {
      const NamedTensors inputs = call.inputs();
      check_together(function, call);
      check_tensors(function, inputs);
      if (call.has_weight) {
        check_weight(function, *call.weight());
      }
      check_clamp(function, call.clamp_min, call.clamp_max);
      check_result_dtype(function, call.dtype);
      terms.device = check_devices(function, call.tensors);
      check_broadcast(function, inputs);
      if (call.op->description.reduces) {
        shape = broadcast_shape(inputs);
      }
      if (call.has_weight) {
        check_weight_shape(function, *call.weight(), shape);
      }
    }

    Terms terms;
    at::DimVector shape; // of the terms, for operators that reduce
  };

  static Settings settings_of(const Call& call) {
    const Description& d = call.op->description;
    return {call.clamp_min, call.clamp_max, d.scale, d.offset};
  }

  // The divisor of the weighted mean, added up in the order of the sum. NaN where it is 0.
  static at::Tensor sum_of_weights(const Checked& checked, at::ScalarType arithmetic, const Reduction& reduction) {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    const Terms weights{math::kFormula<math::Weight>,
                        false,
                        checked.terms.operands.slice(checked.terms.inputs()),
                        {-kInfinity, kInfinity},
                        checked.terms.device};
    return nan_for_zero(Backend::forward_sum(weights, arithmetic, checked.shape, reduction.sum()));
  }

  template <class Where>
  static Gradients backward_into(const at::Tensor& grad_output, const Call& call, const Where& where) {
    const char* const function = call.op->backward_name;
    const Description& d = call.op->description;
    c10::SmallVector<NamedTensor, kMaxInputs + 2> read{{"grad_output", grad_output}};
    read.append(call.tensors.begin(), call.tensors.end());
    if (!d.reduces) {
      check_tensors(function, read);
      check_clamp(function, call.clamp_min, call.clamp_max);
      const at::Device device = check_devices(function, read);
      check_expand(function, read);
      const Destinations to = where(call.inputs(), read, grad_output.sizes());
      Backend::backward({call.formula(), false, call.tensors, settings_of(call), device}, grad_output, to.computed);
      to.hand_over();
      return to.computed;
    }
    const Checked checked(call, function);
    const at::IntArrayRef shape = checked.shape;
    const Reduction reduction = parse_reduction(function, call.reduction, call.dim, static_cast<int64_t>(shape.size()));
    const at::DimVector kept = reduction.kept_shape(shape);
    check_grad_output(function, read[0], call.inputs(), reduction.kept_shape(shape, call.keepdim));
    const Destinations to = where(call.inputs(), read, shape);
    at::Tensor grad = call.keepdim ? grad_output.reshape(kept) : grad_output;
    if (reduction.divides_by_weights(call.has_weight)) {
      const at::ScalarType arithmetic = arithmetic_type(read);
      grad = grad.to(arithmetic).div(sum_of_weights(checked, arithmetic, reduction));
      Backend::backward_sum(checked.terms, grad, to.computed, shape, reduction.sum());
    } else {
      Backend::backward_sum(checked.terms, grad, to.computed, shape, reduction);
    }
    to.hand_over();
    return to.computed;
  }
};

} // namespace kl_ext
