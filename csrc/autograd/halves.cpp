#include "halves.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/csrc/autograd/generated/Functions.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/input_metadata.h>

#include <algorithm>
#include <typeinfo>

#include "../memory.h"

namespace kl_ext::autograd {
namespace {

using torch::autograd::Edge;
using torch::autograd::Node;
using torch::autograd::generated::SliceBackward0;
using torch::autograd::generated::SplitBackward0;
using torch::autograd::generated::SplitWithSizesBackward0;

// The elements [begin, end) of a tensor along a dimension.
struct Part {
  c10::SymIntArrayRef sizes; // of the tensor
  int64_t dim;
  int64_t begin;
  int64_t end;
};

// The dimension that a node cuts and its size, if that is a plain number.
template <class Cut>
std::optional<std::pair<int64_t, int64_t>> dim_and_size(const Cut& node) {
  const auto rank = static_cast<int64_t>(node.self_sym_sizes.size());
  const int64_t dim = node.dim < 0 ? node.dim + rank : node.dim;
  if (dim < 0 || dim >= rank) {
    return std::nullopt;
  }
  const std::optional<int64_t> size = node.self_sym_sizes[dim].maybe_as_int();
  return size ? std::optional(std::pair(dim, *size)) : std::nullopt;
}

std::optional<Part> part_of(const SplitBackward0& node, int64_t number) {
  const auto along = dim_and_size(node);
  const auto length = node.split_size.maybe_as_int();
  if (!along || !length) {
    return std::nullopt;
  }
  const auto [dim, size] = *along;
  return Part{node.self_sym_sizes, dim, number * *length, std::min((number + 1) * *length, size)};
}

std::optional<Part> part_of(const SplitWithSizesBackward0& node, int64_t number) {
  const auto along = dim_and_size(node);
  if (!along) {
    return std::nullopt;
  }
  Part part{node.self_sym_sizes, along->first, 0, 0};
  for (int64_t i = 0; i <= number; ++i) {
    const auto length = node.split_sizes[i].maybe_as_int();
    if (!length) {
      return std::nullopt;
    }
    part.begin = part.end;
    part.end += *length;
  }
  return part;
}

std::optional<Part> part_of(const SliceBackward0& node) {
  const auto along = dim_and_size(node);
  const auto step = node.step.maybe_as_int();
  if (!along || step != 1) {
    return std::nullopt;
  }
  const auto [dim, size] = *along;
  const auto begin = node.start ? node.start->maybe_as_int() : 0;
  const auto end = node.end ? node.end->maybe_as_int() : size;
  if (!begin || !end) {
    return std::nullopt;
  }
  // Like a slice: negative indices count from the end, and those beyond it mean the end.
  const auto place = [size = size](int64_t i) { return std::clamp<int64_t>(i < 0 ? i + size : i, 0, size); };
  return Part{node.self_sym_sizes, dim, place(*begin), place(*end)};
}

// What a node cuts out of one tensor, if it does. Decided by its type, since any node may have any name.
std::optional<Part> part_of(const Edge& edge) {
  const Node& node = *edge.function;
  const std::type_info& type = typeid(node);
  if (type == typeid(SplitBackward0)) {
    return part_of(static_cast<const SplitBackward0&>(node), edge.input_nr);
  }
  if (type == typeid(SplitWithSizesBackward0)) {
    return part_of(static_cast<const SplitWithSizesBackward0&>(node), edge.input_nr);
  }
  if (type == typeid(SliceBackward0)) {
    return part_of(static_cast<const SliceBackward0&>(node));
  }
  return std::nullopt;
}

// Whether autograd accepts this gradient at an edge without changing it.
bool is_expected(const at::Tensor& gradient, const Edge& edge) {
  const auto& metadata = edge.function->input_metadata(edge.input_nr);
  return metadata.is_same_shape(gradient) && metadata.grad_dtype() == gradient.scalar_type() &&
         metadata.device() == gradient.device();
}

} // namespace

std::array<at::Tensor, 3> Halves::allocate(const at::Tensor& mu) const {
  at::DimVector sizes(mu.sizes());
  sizes[dim] *= 2;
  const at::Tensor whole = kl_ext::allocate(sizes, mu.options(), mu.suggest_memory_format());
  const at::AutoDispatchBelowADInplaceOrView guard; // hides these views from autograd: they are only written through
  const auto part = [&](int64_t start) { return whole.as_strided(mu.sizes(), whole.strides(), start * whole.stride(dim)); };
  const int64_t half = mu.size(dim);
  return {whole, part(mu_is_first ? 0 : half), part(mu_is_first ? half : 0)};
}

std::optional<Halves> find_halves(const at::Tensor& mu, const at::Tensor& log_var, const Edge& of_mu, const Edge& of_log_var) {
  if (!of_mu.is_valid() || !of_log_var.is_valid() || at::areAnyTensorSubclassLike({mu, log_var})) {
    return std::nullopt;
  }
  const auto first = part_of(of_mu);
  const auto second = first ? part_of(of_log_var) : std::nullopt;
  if (!second || first->dim != second->dim || first->sizes != second->sizes) {
    return std::nullopt;
  }
  const Edge& whole = of_mu.function->next_edge(0);
  if (!whole.is_valid() || !(whole == of_log_var.function->next_edge(0))) {
    return std::nullopt;
  }
  const auto& metadata = whole.function->input_metadata(whole.input_nr);
  if (metadata.is_nested_tensor() || metadata.is_tensor_subclass() || metadata.shape_as_dim_vector() != first->sizes) {
    return std::nullopt;
  }
  const bool mu_is_first = first->begin == 0;
  const auto& [lower, upper] = mu_is_first ? std::tie(*first, *second) : std::tie(*second, *first);
  const bool are_halves =
      lower.begin == 0 && lower.end == upper.begin && upper.end == 2 * lower.end && first->sizes[first->dim] == upper.end;
  return are_halves ? std::optional(Halves{first->dim, mu_is_first}) : std::nullopt;
}

bool are_unchanged(const at::Tensor& mu, const at::Tensor& log_var, const Edge& of_mu, const Edge& of_log_var) {
  return is_expected(mu, of_mu) && is_expected(log_var, of_log_var) && mu.strides() == log_var.strides();
}

bool is_observed(Node& half) {
  const auto* const executed = torch::autograd::get_current_graph_task_exec_info();
  if (executed == nullptr) { // not called by the engine, which would tell
    return true;
  }
  const auto info = executed->find(&half);
  const bool is_captured = info != executed->end() && info->second.captures_ != nullptr;
  return is_captured || !half.tensor_pre_hooks().empty() || !half.retains_grad_hooks().empty() || !half.pre_hooks().empty() ||
         !half.post_hooks().empty();
}

bool is_result_observed(Node& loss) { return !loss.post_hooks().empty() || torch::autograd::AnomalyMode::is_enabled(); }

} // namespace kl_ext::autograd
