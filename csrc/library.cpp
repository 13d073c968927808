// The only list of the operators: their schemas, the typed handles to call them, and what answers where no kernel does.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "checks.h"
#include "ops.h"

namespace kl_ext {

std::string dtype_name(at::ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }

std::string layout_name(at::Layout layout) {
  switch (layout) {
    case at::kSparse:
      return "torch.sparse_coo";
    case at::kSparseCsr:
      return "torch.sparse_csr";
    case at::kSparseCsc:
      return "torch.sparse_csc";
    case at::kSparseBsr:
      return "torch.sparse_bsr";
    case at::kSparseBsc:
      return "torch.sparse_bsc";
    case at::kMkldnn:
      return "torch._mkldnn";
    default:
      return c10::str(layout);
  }
}

namespace ops {
namespace {

template <class Function>
c10::TypedOperatorHandle<Function> find(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Function>();
}

} // namespace

at::Tensor kl_div_single_loss(const at::Tensor& mu, const at::Tensor& log_var, double clamp_min, double clamp_max,
                              std::optional<at::ScalarType> dtype) {
  static const auto handle = find<decltype(kl_div_single_loss)>("kl_ext::kl_div_single_loss");
  return handle.call(mu, log_var, clamp_min, clamp_max, dtype);
}

std::tuple<at::Tensor, at::Tensor> kl_div_single_loss_backward(const at::Tensor& grad_output, const at::Tensor& mu,
                                                               const at::Tensor& log_var, double clamp_min, double clamp_max,
                                                               std::array<bool, 2> output_mask) {
  static const auto handle = find<decltype(kl_div_single_loss_backward)>("kl_ext::kl_div_single_loss_backward");
  return handle.call(grad_output, mu, log_var, clamp_min, clamp_max, output_mask);
}

void kl_div_single_loss_backward_out(const at::Tensor& grad_output, const at::Tensor& mu, const at::Tensor& log_var,
                                     double clamp_min, double clamp_max, const std::optional<at::Tensor>& grad_mu,
                                     const std::optional<at::Tensor>& grad_log_var) {
  static const auto handle = find<decltype(kl_div_single_loss_backward_out)>("kl_ext::kl_div_single_loss_backward", "out");
  handle.call(grad_output, mu, log_var, clamp_min, clamp_max, grad_mu, grad_log_var);
}

at::Tensor kl_div_pair_loss(const at::Tensor& mu_p, const at::Tensor& log_var_p, const at::Tensor& mu_q,
                            const at::Tensor& log_var_q, double clamp_min, double clamp_max,
                            std::optional<at::ScalarType> dtype) {
  static const auto handle = find<decltype(kl_div_pair_loss)>("kl_ext::kl_div_pair_loss");
  return handle.call(mu_p, log_var_p, mu_q, log_var_q, clamp_min, clamp_max, dtype);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> kl_div_pair_loss_backward(
    const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p, const at::Tensor& mu_q,
    const at::Tensor& log_var_q, double clamp_min, double clamp_max, std::array<bool, 4> output_mask) {
  static const auto handle = find<decltype(kl_div_pair_loss_backward)>("kl_ext::kl_div_pair_loss_backward");
  return handle.call(grad_output, mu_p, log_var_p, mu_q, log_var_q, clamp_min, clamp_max, output_mask);
}

void kl_div_pair_loss_backward_out(const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p,
                                   const at::Tensor& mu_q, const at::Tensor& log_var_q, double clamp_min, double clamp_max,
                                   const std::optional<at::Tensor>& grad_mu_p, const std::optional<at::Tensor>& grad_log_var_p,
                                   const std::optional<at::Tensor>& grad_mu_q,
                                   const std::optional<at::Tensor>& grad_log_var_q) {
  static const auto handle = find<decltype(kl_div_pair_loss_backward_out)>("kl_ext::kl_div_pair_loss_backward", "out");
  handle.call(grad_output, mu_p, log_var_p, mu_q, log_var_q, clamp_min, clamp_max, grad_mu_p, grad_log_var_p, grad_mu_q,
              grad_log_var_q);
}

at::Tensor gaussian_kl_div(const at::Tensor& mu_p, const at::Tensor& log_var_p, const std::optional<at::Tensor>& mu_q,
                           const std::optional<at::Tensor>& log_var_q, double clamp_min, double clamp_max,
                           std::string_view reduction, at::OptionalIntArrayRef dim, bool keepdim,
                           std::optional<at::ScalarType> dtype) {
  static const auto handle = find<decltype(gaussian_kl_div)>("kl_ext::gaussian_kl_div");
  return handle.call(mu_p, log_var_p, mu_q, log_var_q, clamp_min, clamp_max, reduction, dim, keepdim, dtype);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gaussian_kl_div_backward(
    const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p, const std::optional<at::Tensor>& mu_q,
    const std::optional<at::Tensor>& log_var_q, double clamp_min, double clamp_max, std::string_view reduction,
    at::OptionalIntArrayRef dim, std::array<bool, 4> output_mask, bool keepdim) {
  static const auto handle = find<decltype(gaussian_kl_div_backward)>("kl_ext::gaussian_kl_div_backward");
  return handle.call(grad_output, mu_p, log_var_p, mu_q, log_var_q, clamp_min, clamp_max, reduction, dim, output_mask, keepdim);
}

void gaussian_kl_div_backward_out(const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p,
                                  const std::optional<at::Tensor>& mu_q, const std::optional<at::Tensor>& log_var_q,
                                  double clamp_min, double clamp_max, std::string_view reduction, at::OptionalIntArrayRef dim,
                                  bool keepdim, const std::optional<at::Tensor>& grad_mu_p,
                                  const std::optional<at::Tensor>& grad_log_var_p, const std::optional<at::Tensor>& grad_mu_q,
                                  const std::optional<at::Tensor>& grad_log_var_q) {
  static const auto handle = find<decltype(gaussian_kl_div_backward_out)>("kl_ext::gaussian_kl_div_backward", "out");
  handle.call(grad_output, mu_p, log_var_p, mu_q, log_var_q, clamp_min, clamp_max, reduction, dim, keepdim, grad_mu_p,
              grad_log_var_p, grad_mu_q, grad_log_var_q);
}

} // namespace ops

namespace {

// For tensors that no backend of ours takes: says which argument it is. What the tensors are comes before where they are, for a
// sparse tensor comes here beside dense ones on a device that has kernels.
void refuse(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string function = schema.name().substr(schema.name().find("::") + 2);
  const bool has_cuda = op.hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  const char* const devices = has_cuda ? "cpu or cuda" : "cpu (this build has no CUDA kernels)";
  const auto values = torch::jit::last(*stack, schema.arguments().size());
  std::vector<Argument> tensors;
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i].isTensor()) {
      tensors.push_back({schema.arguments()[i].name().c_str(), values[i].toTensor()});
    }
  }
  check_tensors(function.c_str(), tensors);
  for (const auto& [name, tensor] : tensors) {
    TORCH_CHECK(tensor.is_cpu() || (has_cuda && tensor.is_cuda()), function, ": expected ", name, " on ", devices, ", got ",
                tensor.device());
  }
  TORCH_CHECK(false, function, ": expected tensors that hold their numbers, on ", devices);
}

// Inputs with the negative bit, for operators that write where they are told: torch's own fallback, which serves all others, fails
// for those that return nothing. What is written to keeps its bit.
void resolve_negative_inputs(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& value = *(stack->end() - static_cast<std::ptrdiff_t>(arguments.size() - i));
    if (value.isTensor() && arguments[i].alias_info() == nullptr) {
      value = value.toTensor().resolve_neg();
    }
  }
  op.redispatchBoxed(keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::Negative), stack);
}

} // namespace
} // namespace kl_ext

TORCH_LIBRARY(kl_ext, m) {
  const std::vector<at::Tag> elementwise = {at::Tag::pt2_compliant_tag, at::Tag::pointwise};
  const std::vector<at::Tag> compliant = {at::Tag::pt2_compliant_tag};
  m.def(
      "kl_div_single_loss(Tensor mu, Tensor log_var, *, float clamp_min=-30.0, float clamp_max=20.0, ScalarType? dtype=None)"
      " -> Tensor",
      elementwise);
  m.def(
      "kl_div_single_loss_backward(Tensor grad_output, Tensor mu, Tensor log_var, float clamp_min, float clamp_max,"
      " bool[2] output_mask) -> (Tensor, Tensor)",
      compliant);
  m.def(
      "kl_div_single_loss_backward.out(Tensor grad_output, Tensor mu, Tensor log_var, float clamp_min, float clamp_max, *,"
      " Tensor(a!)? grad_mu, Tensor(b!)? grad_log_var) -> ()",
      compliant);
  m.def(
      "kl_div_pair_loss(Tensor mu_p, Tensor log_var_p, Tensor mu_q, Tensor log_var_q, *, float clamp_min=-30.0,"
      " float clamp_max=20.0, ScalarType? dtype=None) -> Tensor",
      elementwise);
  m.def(
      "kl_div_pair_loss_backward(Tensor grad_output, Tensor mu_p, Tensor log_var_p, Tensor mu_q, Tensor log_var_q,"
      " float clamp_min, float clamp_max, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
      compliant);
  m.def(
      "kl_div_pair_loss_backward.out(Tensor grad_output, Tensor mu_p, Tensor log_var_p, Tensor mu_q, Tensor log_var_q,"
      " float clamp_min, float clamp_max, *, Tensor(a!)? grad_mu_p, Tensor(b!)? grad_log_var_p, Tensor(c!)? grad_mu_q,"
      " Tensor(d!)? grad_log_var_q) -> ()",
      compliant);
  m.def(
      "gaussian_kl_div(Tensor mu_p, Tensor log_var_p, Tensor? mu_q=None, Tensor? log_var_q=None, *, float clamp_min=-30.0,"
      " float clamp_max=20.0, str reduction=\"none\", int[]? dim=None, bool keepdim=False, ScalarType? dtype=None) -> Tensor",
      compliant);
  m.def(
      "gaussian_kl_div_backward(Tensor grad_output, Tensor mu_p, Tensor log_var_p, Tensor? mu_q, Tensor? log_var_q,"
      " float clamp_min, float clamp_max, str reduction, int[]? dim, bool[4] output_mask, bool keepdim=False)"
      " -> (Tensor, Tensor, Tensor, Tensor)",
      compliant);
  m.def(
      "gaussian_kl_div_backward.out(Tensor grad_output, Tensor mu_p, Tensor log_var_p, Tensor? mu_q, Tensor? log_var_q,"
      " float clamp_min, float clamp_max, str reduction, int[]? dim, bool keepdim=False, *, Tensor(a!)? grad_mu_p, Tensor(b!)? "
      "grad_log_var_p,"
      " Tensor(c!)? grad_mu_q, Tensor(d!)? grad_log_var_q) -> ()",
      compliant);
}

TORCH_LIBRARY_IMPL(kl_ext, CompositeExplicitAutograd, m) {
  for (const char* name : {"kl_div_single_loss", "kl_div_single_loss_backward", "kl_div_single_loss_backward.out",
                           "kl_div_pair_loss", "kl_div_pair_loss_backward", "kl_div_pair_loss_backward.out", "gaussian_kl_div",
                           "gaussian_kl_div_backward", "gaussian_kl_div_backward.out"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&kl_ext::refuse>());
  }
}

TORCH_LIBRARY_IMPL(kl_ext, Negative, m) {
  for (const char* name :
       {"kl_div_single_loss_backward.out", "kl_div_pair_loss_backward.out", "gaussian_kl_div_backward.out"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&kl_ext::resolve_negative_inputs>());
  }
}
