// Under autocast the inputs stay as they are, half types included, and the loss comes out in float32: the conversion costs no
// pass over memory, and the terms are exact to float32. float64 stays float64.
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "ops.h"
#include "plan.h"

namespace kl_ext {
namespace {

const c10::DispatchKeySet kAutocast({c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA});

at::Tensor kl_div_single_loss(const at::Tensor& mu, const at::Tensor& log_var, double clamp_min, double clamp_max,
                              std::optional<at::ScalarType> dtype) {
  const c10::impl::ExcludeDispatchKeyGuard guard(kAutocast);
  const Argument inputs[] = {{"mu", mu}, {"log_var", log_var}};
  return ops::kl_div_single_loss(mu, log_var, clamp_min, clamp_max, dtype.value_or(arithmetic_type(inputs)));
}

at::Tensor kl_div_pair_loss(const at::Tensor& mu_p, const at::Tensor& log_var_p, const at::Tensor& mu_q,
                            const at::Tensor& log_var_q, double clamp_min, double clamp_max,
                            std::optional<at::ScalarType> dtype) {
  const c10::impl::ExcludeDispatchKeyGuard guard(kAutocast);
  const Argument inputs[] = {{"mu_p", mu_p}, {"log_var_p", log_var_p}, {"mu_q", mu_q}, {"log_var_q", log_var_q}};
  return ops::kl_div_pair_loss(mu_p, log_var_p, mu_q, log_var_q, clamp_min, clamp_max, dtype.value_or(arithmetic_type(inputs)));
}

at::Tensor gaussian_kl_div(const at::Tensor& mu_p, const at::Tensor& log_var_p, const std::optional<at::Tensor>& mu_q,
                           const std::optional<at::Tensor>& log_var_q, double clamp_min, double clamp_max,
                           std::string_view reduction, at::OptionalIntArrayRef dim, bool keepdim,
                           std::optional<at::ScalarType> dtype) {
  const c10::impl::ExcludeDispatchKeyGuard guard(kAutocast);
  const Argument inputs[] = {{"mu_p", mu_p},
                             {"log_var_p", log_var_p},
                             {"mu_q", mu_q ? *mu_q : mu_p},
                             {"log_var_q", log_var_q ? *log_var_q : log_var_p}};
  return ops::gaussian_kl_div(mu_p, log_var_p, mu_q, log_var_q, clamp_min, clamp_max, reduction, dim, keepdim,
                              dtype.value_or(arithmetic_type(inputs)));
}

void register_autocast(torch::Library& m) {
  m.impl("kl_div_single_loss", kl_div_single_loss);
  m.impl("kl_div_pair_loss", kl_div_pair_loss);
  m.impl("gaussian_kl_div", gaussian_kl_div);
}

TORCH_LIBRARY_IMPL(kl_ext, AutocastCPU, m) { register_autocast(m); }

TORCH_LIBRARY_IMPL(kl_ext, AutocastCUDA, m) { register_autocast(m); }

} // namespace
} // namespace kl_ext
