// The operators as every backend registers them: arguments named and checked, then handed to what the backend makes of them.
// Backend has
//
//   Loss, kSingleLoss, kPairLoss, kDivergence     which formula
//   Bounds                                        the clamp
//   forward(loss, inputs, bounds, dtype)                              the terms, in this dtype
//   forward_sum(loss, inputs, bounds, dtype, shape, reduction)        their sums, shape: of the terms
//   backward(loss, arguments, bounds, mask)                           arguments: grad_output of each term, then the inputs
//   backward_sum(loss, grad_output, inputs, bounds, mask, shape, reduction)      grad_output: of the sums
#pragma once

#include <torch/library.h>

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
    check_backward("kl_div_single_loss_backward", arguments, clamp_min, clamp_max);
    auto gradients = Backend::backward(Backend::kSingleLoss, Arguments(arguments), {clamp_min, clamp_max}, output_mask);
    return {std::move(gradients[0]), std::move(gradients[1])};
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
    check_backward("kl_div_pair_loss_backward", arguments, clamp_min, clamp_max);
    return std::tuple_cat(Backend::backward(Backend::kPairLoss, Arguments(arguments), {clamp_min, clamp_max}, output_mask));
  }

  static at::Tensor gaussian_kl_div(const at::Tensor& mu_p, const at::Tensor& log_var_p, const std::optional<at::Tensor>& mu_q,
                                    const std::optional<at::Tensor>& log_var_q, double clamp_min, double clamp_max,
                                    std::string_view reduction, at::OptionalIntArrayRef dim,
                                    std::optional<at::ScalarType> dtype) {
    const char* const function = "gaussian_kl_div";
    return with_inputs(function, mu_p, log_var_p, mu_q, log_var_q, [&](const Loss& loss, Arguments inputs) {
      check_forward(function, inputs, clamp_min, clamp_max, dtype);
      const at::DimVector shape = broadcast_shape(inputs);
      const Reduction parsed = parse_reduction(function, reduction, dim, static_cast<int64_t>(shape.size()));
      const at::ScalarType result = dtype.value_or(result_type(inputs));
      return parsed.is_none ? Backend::forward(loss, inputs, {clamp_min, clamp_max}, result)
                            : Backend::forward_sum(loss, inputs, {clamp_min, clamp_max}, result, shape, parsed);
    });
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gaussian_kl_div_backward(
      const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p, const std::optional<at::Tensor>& mu_q,
      const std::optional<at::Tensor>& log_var_q, double clamp_min, double clamp_max, std::string_view reduction,
      at::OptionalIntArrayRef dim, std::array<bool, 4> output_mask) {
    const char* const function = "gaussian_kl_div_backward";
    return with_inputs(function, mu_p, log_var_p, mu_q, log_var_q, [&](const Loss& loss, Arguments inputs) {
      check_forward(function, inputs, clamp_min, clamp_max, std::nullopt);
      const at::DimVector shape = broadcast_shape(inputs);
      const Reduction parsed = parse_reduction(function, reduction, dim, static_cast<int64_t>(shape.size()));
      check_grad_output(function, {"grad_output", grad_output}, inputs, parsed.kept_shape(at::IntArrayRef(shape)));
      const Mask mask(output_mask.data(), inputs.size());
      return std::tuple_cat(Backend::backward_sum(loss, grad_output, inputs, {clamp_min, clamp_max}, mask, shape, parsed));
    });
  }

  static void register_in(torch::Library& m) {
    m.impl("kl_div_single_loss", kl_div_single_loss);
    m.impl("kl_div_single_loss_backward", kl_div_single_loss_backward);
    m.impl("kl_div_pair_loss", kl_div_pair_loss);
    m.impl("kl_div_pair_loss_backward", kl_div_pair_loss_backward);
    m.impl("gaussian_kl_div", gaussian_kl_div);
    m.impl("gaussian_kl_div_backward", gaussian_kl_div_backward);
  }

 private:
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
