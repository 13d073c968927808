// The gradient of a tensor whose halves are mu and log_var, as most encoders return them: h.chunk(2, dim), a split, or two
// slices.
//
// Autograd would join the two gradients by the backward of chunk, a copy that takes longer than computing them, or for slices
// by two copies into zeros and a sum. So the node of a loss gets one more edge, to where h came from, writes both gradients
// into one tensor of the shape of h, and sends nothing to mu and log_var.
//
// This is decided while the backward pass runs, since nobody may see a difference. The two gradients go their usual ways, and
// nothing goes along the new edge, where
//
//   somebody asks for the gradients of mu or log_var themselves: by a hook on their nodes or on that of the loss, retain_grad,
//   torch.autograd.grad, or anomaly detection, which names the gradient that is NaN;
//   derivatives of the gradients are recorded, or tensor subclasses are passed;
//   mu or log_var have changed since h was cut: `.data` was assigned, or a hook of saved tensors returned different ones.
//
// Two differences remain visible. The node has one more entry in next_functions, and a hook on it gets one more gradient, None.
// And where h has other uses, the order in which its gradients are added may change: the sum may then round differently than
// while somebody watches mu.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>

#include <array>
#include <optional>

namespace kl_ext::autograd {

// How two tensors are halves of one.
struct Halves {
  // Allocates the gradient of the whole, with views of it for mu and log_var; laid out as the backward of chunk would.
  std::array<at::Tensor, 3> allocate(const at::Tensor& mu) const;

  int64_t dim;
  bool mu_is_first;
};

// Which halves of one tensor mu and log_var are, according to the nodes at these edges, which cut them out. The tensors
// themselves cannot tell, since `.data` may have been assigned.
std::optional<Halves> find_halves(const at::Tensor& mu, const at::Tensor& log_var, const torch::autograd::Edge& of_mu,
                                  const torch::autograd::Edge& of_log_var);

// Whether gradients of these tensors can be written as gradients of the halves at these edges: the tensors still have the
// shape, dtype and device that autograd expects there, and the same strides.
bool are_unchanged(const at::Tensor& mu, const at::Tensor& log_var, const torch::autograd::Edge& of_mu,
                   const torch::autograd::Edge& of_log_var);

// Whether somebody watches the gradient that comes to the node of a half.
bool is_observed(torch::autograd::Node& half);

// Whether somebody watches what the node of a loss returns.
bool is_result_observed(torch::autograd::Node& loss);

} // namespace kl_ext::autograd
