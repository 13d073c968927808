// The operators as every backend registers them: arguments named and checked, then handed to what the backend makes of them.
// Backend has
//
//   Loss, kSingleLoss, kPairLoss, kDivergence     which formula
//   Bounds                                        the clamp
//   forward(loss, inputs, bounds, dtype)                              the terms, in this dtype
//   forward_sum(loss, inputs, bounds, dtype, shape, reduction)        their sums, shape: of the terms
//   backward(loss, arguments, bounds, gradients)                      arguments: grad_output of each term, then the inputs
//   backward_sum(loss, grad_output, inputs, bounds, gradients, shape, reduction)      grad_output: of the sums
//
// Gradients go where the backend is told; those that are not wanted are undefined.
#pragma once

#include <torch/library.h>

#include "memory.h"
#include "plan.h"
#include "reduction.h"

namespace kl_ext {

constexpr size_t kMaxInputs = 4;
using Gradients = std::array<at::Tensor, kMaxInputs>;
using Mask = c10::ArrayRef<bool>; // of the gradients that are wanted

// The dimensions of a shape along which an input is broadcast.
inline c10::SmallVector<bool, 8> broadcast_dims(at::IntArrayRef input, at::IntArrayRef shape) {
  c10::SmallVector<bool, 8> dims(shape.size(), true);
  for (size_t back = 1; back <= input.size(); ++back) {
    dims[shape.size() - back] = input[input.size() - back] != shape[shape.size() - back];
  }
  return dims;
}

template <class Backend>
struct Operators {
  using Loss = typename Backend::Loss;

  static at::Tensor kl_div_single_loss(const at::Tensor& mu, const at::Tensor& log_var, double clamp_min, double clamp_max,
                                       std::optional<at::ScalarType> dtype) {
    const Argument inputs[] = {{"mu", mu}, {"log_var", log_var}};
    check_forward("kl_div_single_loss", inputs, clamp_min, clamp_max, dtype);
    return Backend::forward(Backend::kSingleLoss, Arguments(inputs), {clamp_min, clamp_max},
                            dtype.value_or(result_type(inputs)));
  }

  static std::tuple<at::Tensor, at::Tensor> kl_div_single_loss_backward(const at::Tensor& grad_output, const at::Tensor& mu,
                                                                        const at::Tensor& log_var, double clamp_min,
                                                                        double clamp_max, std::array<bool, 2> output_mask) {
    const Argument arguments[] = {{"grad_output", grad_output}, {"mu", mu}, {"log_var", log_var}};
    const char* const function = "kl_div_single_loss_backward";
    auto gradients = backward(function, Backend::kSingleLoss, arguments, clamp_min, clamp_max, wanted(output_mask));
    return {std::move(gradients[0]), std::move(gradients[1])};
  }

  static void kl_div_single_loss_backward_out(const at::Tensor& grad_output, const at::Tensor& mu, const at::Tensor& log_var,
                                              double clamp_min, double clamp_max, const std::optional<at::Tensor>& grad_mu,
                                              const std::optional<at::Tensor>& grad_log_var) {
    const Argument arguments[] = {{"grad_output", grad_output}, {"mu", mu}, {"log_var", log_var}};
    const char* const function = "kl_div_single_loss_backward";
    backward(function, Backend::kSingleLoss, arguments, clamp_min, clamp_max, given({grad_mu, grad_log_var}));
  }

  static at::Tensor kl_div_pair_loss(const at::Tensor& mu_p, const at::Tensor& log_var_p, const at::Tensor& mu_q,
                                     const at::Tensor& log_var_q, double clamp_min, double clamp_max,
                                     std::optional<at::ScalarType> dtype) {
    const Argument inputs[] = {{"mu_p", mu_p}, {"log_var_p", log_var_p}, {"mu_q", mu_q}, {"log_var_q", log_var_q}};
    check_forward("kl_div_pair_loss", inputs, clamp_min, clamp_max, dtype);
    return Backend::forward(Backend::kPairLoss, Arguments(inputs), {clamp_min, clamp_max}, dtype.value_or(result_type(inputs)));
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> kl_div_pair_loss_backward(
      const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p, const at::Tensor& mu_q,
      const at::Tensor& log_var_q, double clamp_min, double clamp_max, std::array<bool, 4> output_mask) {
    const Argument arguments[] = {
        {"grad_output", grad_output}, {"mu_p", mu_p}, {"log_var_p", log_var_p}, {"mu_q", mu_q}, {"log_var_q", log_var_q}};
    const char* const function = "kl_div_pair_loss_backward";
    return std::tuple_cat(backward(function, Backend::kPairLoss, arguments, clamp_min, clamp_max, wanted(output_mask)));
  }

  static void kl_div_pair_loss_backward_out(const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p,
                                            const at::Tensor& mu_q, const at::Tensor& log_var_q, double clamp_min,
                                            double clamp_max, const std::optional<at::Tensor>& grad_mu_p,
                                            const std::optional<at::Tensor>& grad_log_var_p,
                                            const std::optional<at::Tensor>& grad_mu_q,
                                            const std::optional<at::Tensor>& grad_log_var_q) {
    const Argument arguments[] = {
        {"grad_output", grad_output}, {"mu_p", mu_p}, {"log_var_p", log_var_p}, {"mu_q", mu_q}, {"log_var_q", log_var_q}};
    const char* const function = "kl_div_pair_loss_backward";
    backward(function, Backend::kPairLoss, arguments, clamp_min, clamp_max,
             given({grad_mu_p, grad_log_var_p, grad_mu_q, grad_log_var_q}));
  }

  static at::Tensor gaussian_kl_div(const at::Tensor& mu_p, const at::Tensor& log_var_p, const std::optional<at::Tensor>& mu_q,
                                    const std::optional<at::Tensor>& log_var_q, double clamp_min, double clamp_max,
                                    std::string_view reduction, at::OptionalIntArrayRef dim, bool keepdim,
                                    std::optional<at::ScalarType> dtype) {
    const char* const function = "gaussian_kl_div";
    return with_inputs(function, mu_p, log_var_p, mu_q, log_var_q, [&](const Loss& loss, Arguments inputs) {
      check_forward(function, inputs, clamp_min, clamp_max, dtype);
      const at::DimVector shape = broadcast_shape(inputs);
      const Reduction parsed = parse_reduction(function, reduction, dim, static_cast<int64_t>(shape.size()));
      const at::ScalarType result = dtype.value_or(result_type(inputs));
      if (parsed.is_none) {
        return Backend::forward(loss, inputs, {clamp_min, clamp_max}, result);
      }
      at::Tensor sums = Backend::forward_sum(loss, inputs, {clamp_min, clamp_max}, result, shape, parsed);
      return keepdim ? sums.view(parsed.kept_shape(shape, keepdim)) : sums;
    });
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gaussian_kl_div_backward(
      const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p, const std::optional<at::Tensor>& mu_q,
      const std::optional<at::Tensor>& log_var_q, double clamp_min, double clamp_max, std::string_view reduction,
      at::OptionalIntArrayRef dim, std::array<bool, 4> output_mask, bool keepdim) {
    return std::tuple_cat(divergence_backward(grad_output, mu_p, log_var_p, mu_q, log_var_q, clamp_min, clamp_max, reduction,
                                              dim, keepdim, wanted(output_mask)));
  }

  static void gaussian_kl_div_backward_out(const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p,
                                           const std::optional<at::Tensor>& mu_q, const std::optional<at::Tensor>& log_var_q,
                                           double clamp_min, double clamp_max, std::string_view reduction,
                                           at::OptionalIntArrayRef dim, bool keepdim,
                                           const std::optional<at::Tensor>& grad_mu_p,
                                           const std::optional<at::Tensor>& grad_log_var_p,
                                           const std::optional<at::Tensor>& grad_mu_q,
                                           const std::optional<at::Tensor>& grad_log_var_q) {
    divergence_backward(grad_output, mu_p, log_var_p, mu_q, log_var_q, clamp_min, clamp_max, reduction, dim, keepdim,
                        given({grad_mu_p, grad_log_var_p, grad_mu_q, grad_log_var_q}));
  }

  static void register_in(torch::Library& m) {
    m.impl("kl_div_single_loss", kl_div_single_loss);
    m.impl("kl_div_single_loss_backward", kl_div_single_loss_backward);
    m.impl("kl_div_single_loss_backward.out", kl_div_single_loss_backward_out);
    m.impl("kl_div_pair_loss", kl_div_pair_loss);
    m.impl("kl_div_pair_loss_backward", kl_div_pair_loss_backward);
    m.impl("kl_div_pair_loss_backward.out", kl_div_pair_loss_backward_out);
    m.impl("gaussian_kl_div", gaussian_kl_div);
    m.impl("gaussian_kl_div_backward", gaussian_kl_div_backward);
    m.impl("gaussian_kl_div_backward.out", gaussian_kl_div_backward_out);
  }

 private:
  // Where gradients are computed, and the tensors that were given for them, if any were.
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

  // Called with the function's name, grad_output, the inputs and the shape of the terms.
  static auto wanted(Mask mask) {
    return [mask](const char*, Argument, Arguments inputs, at::IntArrayRef) {
      Destinations to;
      for (size_t i = 0; i < inputs.size(); ++i) {
        if (mask[i]) {
          to.computed[i] = allocate_like(inputs[i].tensor);
        }
      }
      return to;
    };
  }

  static auto given(std::initializer_list<std::optional<at::Tensor>> tensors) {
    return
        [tensors = std::vector(tensors)](const char* function, Argument grad_output, Arguments inputs, at::IntArrayRef shape) {
          Destinations to;
          for (size_t i = 0; i < inputs.size(); ++i) {
            to.given[i] = tensors[i].value_or(at::Tensor());
          }
          check_gradients(function, grad_output, inputs, to.given, shape);
          for (size_t i = 0; i < inputs.size(); ++i) {
            const at::Tensor& gradient = to.given[i];
            if (gradient.defined()) {
              // A kernel may write a number before it has read all that share its memory, and knows no negative bit.
              const bool is_beside = gradient.is_neg() || shares_memory(gradient, grad_output.tensor) ||
                                     std::any_of(inputs.begin(), inputs.end(),
                                                 [&](const Argument& input) { return shares_memory(gradient, input.tensor); });
              to.computed[i] = is_beside ? allocate_like(inputs[i].tensor) : gradient;
            }
          }
          return to;
        };
  }

  template <class Where>
  static Gradients backward(const char* function, const Loss& loss, Arguments arguments, double clamp_min, double clamp_max,
                            const Where& where) {
    check_backward(function, arguments, clamp_min, clamp_max);
    const Destinations to = where(function, arguments[0], arguments.slice(1), arguments[0].tensor.sizes());
    Backend::backward(loss, arguments, {clamp_min, clamp_max}, to.computed);
    to.hand_over();
    return to.computed;
  }

  template <class Where>
  static Gradients divergence_backward(const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p,
                                       const std::optional<at::Tensor>& mu_q, const std::optional<at::Tensor>& log_var_q,
                                       double clamp_min, double clamp_max, std::string_view reduction,
                                       at::OptionalIntArrayRef dim, bool keepdim, const Where& where) {
    const char* const function = "gaussian_kl_div_backward";
    return with_inputs(function, mu_p, log_var_p, mu_q, log_var_q, [&](const Loss& loss, Arguments inputs) {
      check_forward(function, inputs, clamp_min, clamp_max, std::nullopt);
      const at::DimVector shape = broadcast_shape(inputs);
      const Reduction parsed = parse_reduction(function, reduction, dim, static_cast<int64_t>(shape.size()));
      check_grad_output(function, {"grad_output", grad_output}, inputs, parsed.kept_shape(shape, keepdim));
      const Destinations to = where(function, {"grad_output", grad_output}, inputs, shape);
      const at::Tensor grad = keepdim ? grad_output.reshape(parsed.kept_shape(shape)) : grad_output;
      Backend::backward_sum(loss, grad, inputs, {clamp_min, clamp_max}, to.computed, shape, parsed);
      to.hand_over();
      return to.computed;
    });
  }

  // Calls use(loss, inputs): without q, against the standard normal.
  template <class Use>
  static auto with_inputs(const char* function, const at::Tensor& mu_p, const at::Tensor& log_var_p,
                          const std::optional<at::Tensor>& mu_q, const std::optional<at::Tensor>& log_var_q, const Use& use) {
    check_together(function, mu_q, log_var_q);
    if (!mu_q) {
      const Argument inputs[] = {{"mu_p", mu_p}, {"log_var_p", log_var_p}};
      return use(Backend::kSingleLoss, Arguments(inputs));
    }
    const Argument inputs[] = {{"mu_p", mu_p}, {"log_var_p", log_var_p}, {"mu_q", *mu_q}, {"log_var_q", *log_var_q}};
    return use(Backend::kDivergence, Arguments(inputs));
  }
};

} // namespace kl_ext
