// The gradient of a tensor of which mu and log_var are the halves, as most encoders return them: h.chunk(2, dim), a split, or
// two slices.
//
// Autograd would have the two gradients joined by the backward of chunk, a copy that takes longer than computing them, or
// between slices by two copies into zeros and a sum. So the node of a loss gets an edge more, to where h came from, writes both
// gradients into one tensor of the shape of h, and sends nothing to mu and log_var.
//
// Whether it does is decided while the backward pass runs, for nobody may see a difference: where somebody asks for the
// gradients of mu or log_var themselves (a hook, retain_grad, torch.autograd.grad of them), records derivatives of the gradients
// or passes tensors that are more than numbers in memory, the two gradients go their usual ways, and nothing goes the new one.
#pragma once

#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/input_metadata.h>

#include <optional>
#include <string>

#include "../memory.h"

namespace kl_ext::autograd {

using torch::autograd::Edge;
using torch::autograd::Node;

// How two tensors are halves of one.
struct Halves {
  // Room for the gradient of the whole, and where those of mu and log_var are in it; laid out as the backward of chunk does.
  std::array<at::Tensor, 3> allocate(const at::Tensor& mu) const {
    at::DimVector sizes(mu.sizes());
    sizes[dim] *= 2;
    const at::Tensor whole = kl_ext::allocate(sizes, mu.options(), mu.suggest_memory_format());
    const at::AutoDispatchBelowADInplaceOrView guard; // only written through, these are no views for autograd to know of
    const auto part = [&](int64_t start) { return whole.as_strided(mu.sizes(), whole.strides(), start * whole.stride(dim)); };
    const int64_t half = mu.size(dim);
    return {whole, part(mu_is_first ? 0 : half), part(mu_is_first ? half : 0)};
  }

  int64_t dim;
  bool mu_is_first;
};

// Whether a node passes on a part of one tensor, and no more.
inline bool is_slicing(const Node& node) {
  const std::string name = node.name();
  return name == "SplitBackward0" || name == "SplitWithSizesBackward0" || name == "SliceBackward0";
}

// Whether the second of two slices of a tensor begins along `dim` where the first ends.
inline bool is_behind(const at::Tensor& second, const at::Tensor& first, int64_t dim) {
  return second.storage_offset() - first.storage_offset() == first.size(dim) * first.stride(dim);
}

// What mu and log_var are halves of: two slices of one shape and stride in the same memory that lie behind each other along the
// only dimension in which the whole is larger, and twice as large. Slices of other steps or of the same place do not fit there.
inline std::optional<Halves> find_halves(const at::Tensor& mu, const at::Tensor& log_var, const Edge& of_mu,
                                         const Edge& of_log_var) {
  if (!of_mu.is_valid() || !of_log_var.is_valid() || of_mu.function->num_outputs() != 1 ||
      of_log_var.function->num_outputs() != 1 || at::areAnyTensorSubclassLike({mu, log_var}) ||
      !mu.storage().is_alias_of(log_var.storage()) || mu.sizes() != log_var.sizes() || mu.strides() != log_var.strides() ||
      mu.numel() == 0 || !is_slicing(*of_mu.function) || !is_slicing(*of_log_var.function)) {
    return std::nullopt;
  }
  const Edge& whole = of_mu.function->next_edge(0);
  if (!whole.is_valid() || !(whole == of_log_var.function->next_edge(0))) {
    return std::nullopt;
  }
  const auto& metadata = whole.function->input_metadata(whole.input_nr);
  if (metadata.is_nested_tensor() || metadata.is_tensor_subclass()) {
    return std::nullopt;
  }
  const auto sizes = metadata.shape_as_dim_vector();
  std::optional<int64_t> dim;
  for (int64_t d = 0; d < mu.dim(); ++d) {
    if (sizes[d] != mu.size(d)) {
      if (dim || sizes[d] != 2 * mu.size(d)) {
        return std::nullopt;
      }
      dim = d;
    }
  }
  if (!dim || mu.stride(*dim) <= 0 || !(is_behind(log_var, mu, *dim) || is_behind(mu, log_var, *dim))) {
    return std::nullopt;
  }
  return Halves{*dim, is_behind(log_var, mu, *dim)};
}

// Whether somebody wants to see what comes to a node.
inline bool is_observed(Node& node) {
  const auto* const executed = torch::autograd::get_current_graph_task_exec_info();
  if (executed == nullptr) { // not the engine, which would tell
    return true;
  }
  const auto info = executed->find(&node);
  const bool is_captured = info != executed->end() && info->second.captures_ != nullptr;
  return is_captured || !node.tensor_pre_hooks().empty() || !node.retains_grad_hooks().empty() || !node.pre_hooks().empty() ||
         !node.post_hooks().empty();
}

} // namespace kl_ext::autograd
