// What the nodes of all operators share. Only this file knows how torch versions differ: a Node is counted by shared_ptr up to
// torch 2.12 and by intrusive_ptr after it, and from 2.14 on hooks are told of each node that is made.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <array>
#include <memory>
#include <type_traits>

#include "../operators.h"

namespace kl_ext::autograd {

using torch::autograd::edge_list;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::SwapSavedVariables;

// grad_output, the inputs and the weight.
constexpr size_t kMaxTensors = kMaxInputs + 2;

using Tensors = c10::SmallVector<at::Tensor, kMaxTensors>; // undefined where there is none

template <class T, bool intrusive = std::is_base_of_v<c10::intrusive_ptr_target, Node>>
struct Counted {
  static auto make(edge_list&& edges) { return c10::make_intrusive<T>(std::move(edges)); }
};

template <class T>
struct Counted<T, false> {
  static auto make(edge_list&& edges) {
    return std::shared_ptr<T>(new T(std::move(edges)), [](T* node) { deleteNode(node); });
  }
};

// A node with an edge to each tensor.
template <class T>
auto make_node(NamedTensors tensors) {
  edge_list edges;
  edges.reserve(tensors.size());
  for (const auto& [name, tensor] : tensors) {
    edges.push_back(torch::autograd::impl::gradient_edge(tensor));
  }
  return Counted<T>::make(std::move(edges));
}

// Makes a node the grad_fn of results.
template <class Pointer>
void record(at::TensorList results, const Pointer& node) {
  for (const auto& result : results) {
    torch::autograd::set_history(result, node);
  }
  if constexpr (requires { fire_node_creation_hooks(node); }) {
    fire_node_creation_hooks(node);
  }
}

inline bool any_requires_grad(NamedTensors tensors) {
  return at::GradMode::is_enabled() && std::any_of(tensors.begin(), tensors.end(),
                                                   [](const NamedTensor& argument) { return argument.tensor.requires_grad(); });
}

// What a node knows of a call besides its tensors.
struct Options {
  Options() = default;

  explicit Options(const Call& call) { read(call); }

  void read(const Call& call) {
    op = call.op;
    formula = call.formula();
    has_weight = call.has_weight;
    clamp_min = call.clamp_min;
    clamp_max = call.clamp_max;
    reduction = call.reduction;
    dim = call.dim ? std::optional(call.dim->vec()) : std::nullopt;
    keepdim = call.keepdim;
  }

  // The call rebuilt, on these inputs and weight.
  Call call(const Tensors& tensors) const {
    Call call(*op);
    const size_t inputs = tensors.size() - (has_weight ? 1 : 0);
    for (size_t i = 0; i < tensors.size(); ++i) {
      call.tensors.push_back({i < inputs ? op->description.inputs[i] : "weight", tensors[i]});
    }
    call.has_weight = has_weight;
    std::fill_n(call.is_given.begin(), inputs, true);
    call.clamp_min = clamp_min;
    call.clamp_max = clamp_max;
    call.reduction = reduction;
    call.dim = dim ? at::OptionalIntArrayRef(*dim) : std::nullopt;
    call.keepdim = keepdim;
    return call;
  }

  void collect(CompiledNodeArgs& args) const {
    args.collect(std::string(op->description.name));
    args.collect(static_cast<int64_t>(formula));
    args.collect(has_weight);
    args.collect(clamp_min);
    args.collect(clamp_max);
    args.collect(reduction);
    args.collect(dim);
    args.collect(keepdim);
  }

  const Operator* op = nullptr;
  int formula = 0;
  bool has_weight = false;
  double clamp_min = 0;
  double clamp_max = 0;
  std::string reduction;
  std::optional<std::vector<int64_t>> dim;
  bool keepdim = false;
};

// A node that saves the tensors of a call, some of which may be left out.
struct SavingNode : Node {
  using Node::Node;

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved) {
      variable.reset_data();
    }
  }

  // For compiled autograd: what the node holds, and how to apply it to stand-ins for that.
  void compiled_args(CompiledNodeArgs& args) const override {
    for (size_t i = 0; i < saved.size(); ++i) {
      args.collect(saved[i], /*is_output=*/false);
      args.collect(dtypes[i]);
    }
    args.collect(shape);
    options.collect(args);
  }

  variable_list apply_with_saved(const variable_list& inputs, SwapSavedVariables& swap) override {
    for (auto& variable : saved) {
      swap.before(variable);
    }
    swap.before(shape);
    variable_list result = this->apply(variable_list(inputs));
    for (auto& variable : saved) {
      swap.after(variable);
    }
    swap.after(shape);
    return result;
  }

  // Saves the next tensor.
  void save(const at::Tensor& tensor, bool is_needed) {
    dtypes.push_back(tensor.scalar_type());
    is_needed ? void(saved.emplace_back(tensor, /*is_output=*/false)) : void(saved.emplace_back());
  }

  Tensors unpack() {
    const std::lock_guard<std::mutex> lock(mutex_);
    Tensors tensors;
    for (const auto& variable : saved) {
      tensors.push_back(variable.unpack());
    }
    return tensors;
  }

  Mask wanted(size_t inputs, size_t first = 0) const {
    Mask mask{};
    for (size_t i = 0; i < inputs; ++i) {
      mask[i] = task_should_compute_output(first + i);
    }
    return mask;
  }

  Options options;
  c10::SmallVector<SavedVariable, 3> saved;
  c10::SmallVector<at::ScalarType, kMaxTensors> dtypes;
  std::vector<c10::SymInt> shape; // of the terms, if grad_output and the saved tensors may not determine it
};

} // namespace kl_ext::autograd
