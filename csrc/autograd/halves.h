// The gradient of a tensor of which mu and log_var are the halves, as most encoders return them: h.chunk(2, dim), a split, or
// two slices.
//
// Autograd would have the two gradients joined by the backward of chunk, a copy that takes longer than computing them, or
// between slices by two copies into zeros and a sum. So the node of a loss gets an edge more, to where h came from, writes both
// gradients into one tensor of the shape of h, and sends nothing to mu and log_var.
//
// Whether it does is decided while the backward pass runs, for nobody may see a difference. The two gradients go their usual
// ways, and nothing goes the new one, where
//
//   somebody asks for the gradients of mu or log_var themselves: by a hook, on their nodes or that of the loss, by retain_grad,
//   by torch.autograd.grad of them, or by anomaly detection, which names the gradient that is not a number;
//   derivatives of the gradients are recorded, or tensors are passed that are more than numbers in memory;
//   mu or log_var are not what they were when h was cut: `.data` was assigned, or a hook of saved tensors returned other ones.
//
// Two things can be seen all the same. The node has one more entry in next_functions, and a hook on it gets one more gradient,
// None. And where h has other uses, its gradients are added in the order in which they come, which may be another one: the sum
// may round otherwise than it does while somebody watches mu.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>

#include <array>
#include <optional>

namespace kl_ext::autograd {

// How two tensors are halves of one.
struct Halves {
  // Room for the gradient of the whole, and where those of mu and log_var are in it; laid out as the backward of chunk does.
  std::array<at::Tensor, 3> allocate(const at::Tensor& mu) const;

  int64_t dim;
  bool mu_is_first;
};

// What mu and log_var are halves of, as the nodes at these edges tell: which parts of one tensor they cut out. The tensors
// themselves do not tell, for `.data` may have been assigned.
std::optional<Halves> find_halves(const at::Tensor& mu, const at::Tensor& log_var, const torch::autograd::Edge& of_mu,
                                  const torch::autograd::Edge& of_log_var);

// Whether gradients of these tensors can be written as those of the halves at these edges: the tensors are still of the shape,
// dtype and device that autograd expects there, and laid out alike.
bool are_unchanged(const at::Tensor& mu, const at::Tensor& log_var, const torch::autograd::Edge& of_mu,
                   const torch::autograd::Edge& of_log_var);

// Whether somebody wants to see what comes to the node of a half.
bool is_observed(torch::autograd::Node& half);

// Whether somebody wants to see what the node of a loss returns.
bool is_result_observed(torch::autograd::Node& loss);

} // namespace kl_ext::autograd
