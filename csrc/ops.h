// <kl_ext/ops.h>: the functions of kl_ext for C++ programs, which link kl_ext::kl_ext.
//
//   at::Tensor kl = kl_ext::gaussian_kl_div(mu, log_var, {.weight = mask, .reduction = "sum", .dim = {1}});
//
// Formulas, names and defaults are those of the Python functions, whose docstrings have the details. Each call goes through
// torch's dispatcher, so that autograd and autocast apply.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace kl_ext {

struct GaussianKlDivOptions {
  std::optional<at::Tensor> weight = std::nullopt; // multiplies the terms, to whose shape it broadcasts; 0 leaves a term out
  std::optional<double> clamp_min = -30.0;         // of log-variances; nullopt: no bound
  std::optional<double> clamp_max = 20.0;
  std::string reduction = "none"; // "none", "sum", "mean" or "batchmean"
  std::vector<int64_t> dim = {};  // what "sum" and "mean" reduce; empty: all dimensions
  bool keepdim = false;
  std::optional<at::ScalarType> dtype = std::nullopt; // of the result; nullopt: as the inputs promote
};

struct NormalKlDivOptions {
  std::optional<at::Tensor> weight = std::nullopt; // these are as above
  std::string reduction = "none";
  std::vector<int64_t> dim = {};
  bool keepdim = false;
  std::optional<at::ScalarType> dtype = std::nullopt;
};

namespace detail {

using MaybeTensor = const std::optional<at::Tensor>&;

// Throws where the operator has another signature.
template <class Function>
c10::TypedOperatorHandle<Function> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

inline double low(std::optional<double> clamp_min) { return clamp_min.value_or(-std::numeric_limits<double>::infinity()); }
inline double high(std::optional<double> clamp_max) { return clamp_max.value_or(std::numeric_limits<double>::infinity()); }

inline at::OptionalIntArrayRef given(const std::vector<int64_t>& dim) {
  return dim.empty() ? at::OptionalIntArrayRef() : at::OptionalIntArrayRef(dim);
}

} // namespace detail

// The divergence of N(mu, exp(log_var)) from N(0, 1), for each element, in nats.
inline at::Tensor kl_div_single_loss(const at::Tensor& mu, const at::Tensor& log_var, std::optional<double> clamp_min = -30.0,
                                     std::optional<double> clamp_max = 20.0) {
  using Function = at::Tensor(const at::Tensor&, const at::Tensor&, double, double, std::optional<at::ScalarType>);
  static const auto op = detail::find<Function>("kl_ext::kl_div_single_loss");
  return op.call(mu, log_var, detail::low(clamp_min), detail::high(clamp_max), std::nullopt);
}

// Not the divergence, but twice it and a half, for each element.
inline at::Tensor kl_div_pair_loss(const at::Tensor& mu_p, const at::Tensor& log_var_p, const at::Tensor& mu_q,
                                   const at::Tensor& log_var_q, std::optional<double> clamp_min = -30.0,
                                   std::optional<double> clamp_max = 20.0) {
  using Function = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double, double,
                              std::optional<at::ScalarType>);
  static const auto op = detail::find<Function>("kl_ext::kl_div_pair_loss");
  return op.call(mu_p, log_var_p, mu_q, log_var_q, detail::low(clamp_min), detail::high(clamp_max), std::nullopt);
}

// The divergence of Gaussians from the logarithms of their variances, in nats.
inline at::Tensor gaussian_kl_div(const at::Tensor& mu_p, const at::Tensor& log_var_p, const std::optional<at::Tensor>& mu_q,
                                  const std::optional<at::Tensor>& log_var_q, const GaussianKlDivOptions& options = {}) {
  using Function =
      at::Tensor(const at::Tensor&, const at::Tensor&, detail::MaybeTensor, detail::MaybeTensor, detail::MaybeTensor, double,
                 double, std::string_view, at::OptionalIntArrayRef, bool, std::optional<at::ScalarType>);
  static const auto op = detail::find<Function>("kl_ext::gaussian_kl_div");
  return op.call(mu_p, log_var_p, mu_q, log_var_q, options.weight, detail::low(options.clamp_min),
                 detail::high(options.clamp_max), options.reduction, detail::given(options.dim), options.keepdim,
                 options.dtype);
}

// From N(0, 1).
inline at::Tensor gaussian_kl_div(const at::Tensor& mu, const at::Tensor& log_var, const GaussianKlDivOptions& options = {}) {
  return gaussian_kl_div(mu, log_var, std::nullopt, std::nullopt, options);
}

// The divergence of Gaussians from their standard deviations, in nats. Nothing is clamped.
inline at::Tensor normal_kl_div(const at::Tensor& loc_p, const at::Tensor& scale_p, const std::optional<at::Tensor>& loc_q,
                                const std::optional<at::Tensor>& scale_q, const NormalKlDivOptions& options = {}) {
  using Function =
      at::Tensor(const at::Tensor&, const at::Tensor&, detail::MaybeTensor, detail::MaybeTensor, detail::MaybeTensor,
                 std::string_view, at::OptionalIntArrayRef, bool, std::optional<at::ScalarType>);
  static const auto op = detail::find<Function>("kl_ext::normal_kl_div");
  return op.call(loc_p, scale_p, loc_q, scale_q, options.weight, options.reduction, detail::given(options.dim), options.keepdim,
                 options.dtype);
}

// From N(0, 1).
inline at::Tensor normal_kl_div(const at::Tensor& loc, const at::Tensor& scale, const NormalKlDivOptions& options = {}) {
  return normal_kl_div(loc, scale, std::nullopt, std::nullopt, options);
}

} // namespace kl_ext
