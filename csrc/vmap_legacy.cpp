// The batching of is_grads_batched, of functional.jacobian(vectorize=True) and of gradcheck: torch's first vmap, which has a
// dispatch key of its own. torch.func.vmap is in kl_ext/_vmap.py.
#include <ATen/LegacyVmapTransforms.h>
#include <torch/library.h>

#include "ops.h"

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

template <class Forward, class... Inputs>
at::Tensor forward(Forward* operation, double clamp_min, double clamp_max, std::optional<at::ScalarType> dtype,
                   const Inputs&... inputs) {
  const Batch<sizeof...(Inputs)> batch({inputs...});
  return std::apply(
      [&](const auto&... tensors) { return batch.to_logical(operation(tensors..., clamp_min, clamp_max, dtype)); },
      batch.physical);
}

// A gradient for each example, of an input that the batch shares too.
template <class Backward, size_t kInputs, class... Inputs>
auto backward(Backward* operation, double clamp_min, double clamp_max, std::array<bool, kInputs> output_mask,
              const at::Tensor& grad_output, const Inputs&... inputs) {
  const Batch<kInputs + 1> batch({grad_output, inputs...});
  auto gradients = std::apply([&](const auto&... tensors) { return operation(tensors..., clamp_min, clamp_max, output_mask); },
                              batch.physical);
  size_t input = 0;
  const auto restore = [&](at::Tensor& gradient) {
    const at::Tensor& physical = batch.views[++input].tensor();
    if (gradient.defined()) {
      gradient = batch.to_logical(gradient.reshape(physical.sizes()));
    }
  };
  std::apply([&](auto&... gradient) { (restore(gradient), ...); }, gradients);
  return gradients;
}

at::Tensor kl_div_single_loss(const at::Tensor& mu, const at::Tensor& log_var, double clamp_min, double clamp_max,
                              std::optional<at::ScalarType> dtype) {
  return forward(ops::kl_div_single_loss, clamp_min, clamp_max, dtype, mu, log_var);
}

std::tuple<at::Tensor, at::Tensor> kl_div_single_loss_backward(const at::Tensor& grad_output, const at::Tensor& mu,
                                                               const at::Tensor& log_var, double clamp_min, double clamp_max,
                                                               std::array<bool, 2> output_mask) {
  return backward(ops::kl_div_single_loss_backward, clamp_min, clamp_max, output_mask, grad_output, mu, log_var);
}

at::Tensor kl_div_pair_loss(const at::Tensor& mu_p, const at::Tensor& log_var_p, const at::Tensor& mu_q,
                            const at::Tensor& log_var_q, double clamp_min, double clamp_max,
                            std::optional<at::ScalarType> dtype) {
  return forward(ops::kl_div_pair_loss, clamp_min, clamp_max, dtype, mu_p, log_var_p, mu_q, log_var_q);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> kl_div_pair_loss_backward(
    const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p, const at::Tensor& mu_q,
    const at::Tensor& log_var_q, double clamp_min, double clamp_max, std::array<bool, 4> output_mask) {
  return backward(ops::kl_div_pair_loss_backward, clamp_min, clamp_max, output_mask, grad_output, mu_p, log_var_p, mu_q,
                  log_var_q);
}

TORCH_LIBRARY_IMPL(kl_ext, Batched, m) {
  m.impl("kl_div_single_loss", kl_div_single_loss);
  m.impl("kl_div_single_loss_backward", kl_div_single_loss_backward);
  m.impl("kl_div_pair_loss", kl_div_pair_loss);
  m.impl("kl_div_pair_loss_backward", kl_div_pair_loss_backward);
}

} // namespace
} // namespace kl_ext
