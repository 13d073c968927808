// The batching of is_grads_batched, of functional.jacobian(vectorize=True) and of gradcheck: torch's first vmap, which has a
// dispatch key of its own. torch.func.vmap is in kl_ext/_vmap.py.
#include <ATen/ExpandUtils.h>
#include <ATen/LegacyVmapTransforms.h>
#include <torch/library.h>

#include "ops.h"
#include "reduction.h"

namespace kl_ext {
namespace {

// The physical tensors: batch dimensions in front, expanded to the whole batch, which costs no memory, and ones behind them, so
// that the logical dimensions broadcast from the right.
template <size_t N>
struct Batch {
  explicit Batch(const std::array<at::Tensor, N>& logical)
      : views(at::MultiBatchVmapTransform::logicalToPhysical(at::TensorList(logical))) {
    const int64_t batch_dims = views[0].numBatchDims();
    int64_t rank = 0;
    for (const auto& view : views) {
      rank = std::max(rank, view.tensor().dim());
    }
    for (size_t i = 0; i < N; ++i) {
      physical[i] = views[i].tensor();
      while (physical[i].dim() < rank) {
        physical[i] = physical[i].unsqueeze(batch_dims);
      }
    }
  }

  at::Tensor to_logical(const at::Tensor& result) const { return views[0].getPhysicalToLogicalMap().apply(result); }

  at::VmapPhysicalViewVec views;
  std::array<at::Tensor, N> physical;
};

// A gradient for each example, of an input that the batch shares too.
template <class Backward, class... Inputs>
auto backward(const Backward& operation, const at::Tensor& grad_output, const Inputs&... inputs) {
  const Batch<1 + sizeof...(Inputs)> batch({grad_output, inputs...});
  auto gradients = std::apply(operation, batch.physical);
  size_t input = 0;
  const auto restore = [&](at::Tensor& gradient) {
    const at::Tensor& physical = batch.views[++input].tensor();
    if (gradient.defined()) {
      gradient = batch.to_logical(gradient.reshape(physical.sizes()));
    }
  };
  std::apply([&](auto&... gradient) { ((input < sizeof...(Inputs) ? restore(gradient) : void()), ...); }, gradients);
  return gradients;
}

std::tuple<at::Tensor, at::Tensor> kl_div_single_loss_backward(const at::Tensor& grad_output, const at::Tensor& mu,
                                                               const at::Tensor& log_var, double clamp_min, double clamp_max,
                                                               std::array<bool, 2> output_mask) {
  const auto operation = [&](const auto&... tensors) {
    return ops::kl_div_single_loss_backward(tensors..., clamp_min, clamp_max, output_mask);
  };
  return backward(operation, grad_output, mu, log_var);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> kl_div_pair_loss_backward(
    const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p, const at::Tensor& mu_q,
    const at::Tensor& log_var_q, double clamp_min, double clamp_max, std::array<bool, 4> output_mask) {
  const auto operation = [&](const auto&... tensors) {
    return ops::kl_div_pair_loss_backward(tensors..., clamp_min, clamp_max, output_mask);
  };
  return backward(operation, grad_output, mu_p, log_var_p, mu_q, log_var_q);
}

// The gradient of the terms from that of their reduction, in operators that batch.
at::Tensor unreduce(const at::Tensor& grad_output, at::TensorList inputs, std::string_view reduction,
                    at::OptionalIntArrayRef dim, bool keepdim) {
  at::DimVector shape(inputs[0].sizes());
  bool is_double = grad_output.scalar_type() == at::kDouble;
  for (const auto& input : inputs) {
    shape = at::infer_size_dimvector(shape, input.sizes());
    is_double |= input.scalar_type() == at::kDouble;
  }
  const Reduction how = parse_reduction("gaussian_kl_div_backward", reduction, dim, static_cast<int64_t>(shape.size()));
  const at::Tensor grad = grad_output.to(is_double ? at::kDouble : at::kFloat);
  const at::Tensor divided = how.divides ? quotient(grad, how.divisor(at::IntArrayRef(shape))) : grad;
  return (keepdim ? divided : how.unsqueeze(divided)).expand(shape);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gaussian_kl_div_backward(
    const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p, const std::optional<at::Tensor>& mu_q,
    const std::optional<at::Tensor>& log_var_q, double clamp_min, double clamp_max, std::string_view reduction,
    at::OptionalIntArrayRef dim, std::array<bool, 4> output_mask, bool keepdim) {
  const auto operation = [&](const at::Tensor& grad_terms, const at::Tensor& mean, const at::Tensor& log_var,
                             const auto&... q) {
    const std::array<std::optional<at::Tensor>, 2> optional_q = {q...};
    return ops::gaussian_kl_div_backward(grad_terms, mean, log_var, optional_q[0], optional_q[1], clamp_min, clamp_max, "none",
                                         std::nullopt, output_mask, /*keepdim=*/false);
  };
  if (!mu_q) {
    return backward(operation, unreduce(grad_output, {mu_p, log_var_p}, reduction, dim, keepdim), mu_p, log_var_p);
  }
  return backward(operation, unreduce(grad_output, {mu_p, log_var_p, *mu_q, *log_var_q}, reduction, dim, keepdim), mu_p,
                  log_var_p, *mu_q, *log_var_q);
}

TORCH_LIBRARY_IMPL(kl_ext, Batched, m) {
  m.impl("kl_div_single_loss_backward", kl_div_single_loss_backward);
  m.impl("kl_div_pair_loss_backward", kl_div_pair_loss_backward);
  m.impl("gaussian_kl_div_backward", gaussian_kl_div_backward);
}

} // namespace
} // namespace kl_ext
