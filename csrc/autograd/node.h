// What the nodes of every operator share, and the only place that knows how torch versions differ: a Node is counted by
// shared_ptr up to torch 2.12 and by intrusive_ptr after it, and from 2.14 on hooks want to hear of each one made.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <array>
#include <memory>
#include <type_traits>

namespace kl_ext::autograd {

using torch::autograd::edge_list;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::SwapSavedVariables;

template <size_t N>
using Tensors = std::array<at::Tensor, N>;

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
template <class T, size_t N>
auto make_node(const Tensors<N>& tensors) {
  edge_list edges;
  edges.reserve(N);
  for (const auto& tensor : tensors) {
    edges.push_back(torch::autograd::impl::gradient_edge(tensor));
  }
  return Counted<T>::make(std::move(edges));
}

template <class Pointer, size_t N>
void set_history(const Tensors<N>& results, const Pointer& node) {
  for (const auto& result : results) {
    torch::autograd::set_history(result, node);
  }
  if constexpr (requires { fire_node_creation_hooks(node); }) {
    fire_node_creation_hooks(node);
  }
}

template <size_t N>
bool any_requires_grad(const Tensors<N>& tensors) {
  return at::GradMode::is_enabled() &&
         std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& tensor) { return tensor.requires_grad(); });
}

// The forward-mode tangents, undefined where there is none, and the tensors without them.
template <size_t N>
Tensors<N> tangents_of(const Tensors<N>& tensors) {
  Tensors<N> tangents;
  for (size_t i = 0; i < N; ++i) {
    tangents[i] = tensors[i]._fw_grad(/*level=*/0);
  }
  return tangents;
}

template <size_t N>
Tensors<N> primals_of(const Tensors<N>& tensors) {
  Tensors<N> primals;
  for (size_t i = 0; i < N; ++i) {
    primals[i] = tensors[i]._fw_primal(/*level=*/0);
  }
  return primals;
}

template <size_t N>
std::array<bool, N> defined(const Tensors<N>& tensors) {
  std::array<bool, N> result;
  for (size_t i = 0; i < N; ++i) {
    result[i] = tensors[i].defined();
  }
  return result;
}

template <size_t N>
bool any(const std::array<bool, N>& flags) {
  return std::any_of(flags.begin(), flags.end(), [](bool flag) { return flag; });
}

// A node of the operator Op, which knows the arguments that are not tensors: it holds N saved tensors, some of which may be
// left out.
template <class Op, size_t N>
struct SavingNode : Node {
  using Node::Node;

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved) {
      variable.reset_data();
    }
  }

  // Compiled autograd: what the node holds, and the node applied to stand-ins for it.
  void compiled_args(CompiledNodeArgs& args) const override {
    for (const auto& variable : saved) {
      args.collect(variable, /*is_output=*/false);
    }
    for (const auto dtype : dtypes) {
      args.collect(dtype);
    }
    args.collect(shape);
    op.collect(args);
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

  void save(const Tensors<N>& tensors, const std::array<bool, N>& needed) {
    for (size_t i = 0; i < N; ++i) {
      dtypes[i] = tensors[i].scalar_type();
      if (needed[i]) {
        saved[i] = SavedVariable(tensors[i], /*is_output=*/false);
      }
    }
  }

  Tensors<N> unpack() {
    const std::lock_guard<std::mutex> lock(mutex_);
    Tensors<N> tensors;
    for (size_t i = 0; i < N; ++i) {
      tensors[i] = saved[i].unpack();
    }
    return tensors;
  }

  template <size_t kCount>
  std::array<bool, kCount> wanted(size_t first = 0) const {
    std::array<bool, kCount> mask;
    for (size_t i = 0; i < kCount; ++i) {
      mask[i] = task_should_compute_output(first + i);
    }
    return mask;
  }

  Op op;
  std::array<SavedVariable, N> saved;
  std::array<at::ScalarType, N> dtypes{};
  std::vector<c10::SymInt> shape; // of the terms, where grad_output and what is saved may not tell
};

} // namespace kl_ext::autograd
