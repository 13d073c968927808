// All derivatives of every operator: reverse mode, forward mode, second order.
//
// First derivatives always come from the backward operator, so they have the same bits in reverse and forward mode, with and
// without create_graph. Second derivatives come from the curvature (formulas.h), and higher ones from differentiating that.
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/new_zeros.h>

#include <cctype>

#include "../memory.h"
#include "../signature.h"
#include "derived.h"
#include "halves.h"

namespace kl_ext::autograd {
namespace {

bool any(const Mask& flags) {
  return std::any_of(flags.begin(), flags.end(), [](bool flag) { return flag; });
}

bool any_defined(const Tensors& tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& tensor) { return tensor.defined(); });
}

// The forward-mode tangents, undefined where an argument has none, and the tensors without them.
Tensors tangents_of(NamedTensors arguments) {
  Tensors tangents;
  for (const auto& [name, tensor] : arguments) {
    tangents.push_back(tensor._fw_grad(/*level=*/0));
  }
  return tangents;
}

bool any_has_tangent(NamedTensors arguments) {
  return std::any_of(arguments.begin(), arguments.end(),
                     [](const NamedTensor& argument) { return argument.tensor._fw_grad(/*level=*/0).defined(); });
}

Tensors primals_of(NamedTensors arguments) {
  Tensors primals;
  for (const auto& [name, tensor] : arguments) {
    primals.push_back(tensor._fw_primal(/*level=*/0));
  }
  return primals;
}

// "KlDivSingleLossBackward" for kl_div_single_loss; "StandardGaussianKlDivBackward" for gaussian_kl_div without q.
std::string node_name(const Options& options, size_t inputs) {
  const Description& d = options.op->description;
  std::string name = inputs < d.most ? "Standard" : "";
  bool begins = true;
  for (const char letter : std::string_view(d.name)) {
    if (letter != '_') {
      name += begins ? static_cast<char>(std::toupper(letter)) : letter;
    }
    begins = letter == '_';
  }
  return name + "Backward";
}

struct BackwardBackward : SavingNode {
  using SavingNode::SavingNode;

  size_t inputs() const { return saved.size() - 1 - (options.has_weight ? 1 : 0); }

  std::string name() const override { return node_name(options, inputs()) + "Backward"; }

  variable_list apply(variable_list&& grads) override {
    const Tensors v(grads.begin(), grads.begin() + static_cast<std::ptrdiff_t>(inputs()));
    variable_list result(num_outputs());
    if (any_defined(v)) {
      const Tensors all = unpack();
      const at::Tensor& grad_output = all[0];
      const Derived derived(options, Tensors(all.begin() + 1, all.end()));
      if (task_should_compute_output(0)) {
        result[0] = derived.directional(v, grad_output);
      }
      const Mask mask = wanted(inputs(), 1);
      if (any(mask)) {
        Tensors rows = derived.second_order(grad_output, v, mask);
        std::move(rows.begin(), rows.end(), result.begin() + 1);
      }
    }
    return result;
  }
};

struct BackwardNode : SavingNode {
  using SavingNode::SavingNode;

  size_t inputs() const { return saved.size() - (options.has_weight ? 1 : 0); }

  std::string name() const override { return node_name(options, inputs()); }

  variable_list apply(variable_list&& grads) override {
    const at::Tensor& grad_output = grads[0];
    const Mask mask = wanted(inputs());
    variable_list result(num_outputs());
    if (!grad_output.defined() || !any(mask)) {
      return result;
    }
    Tensors tensors = unpack();
    for (size_t i = 0; i < inputs(); ++i) {
      if (!tensors[i].defined()) { // the wanted gradients depend only on its shape, so any number will do
        // From grad_output itself, not from its device, which compiled autograd does not know yet.
        tensors[i] = grad_output.new_zeros({}, dtypes[i]).expand_symint(shape);
      }
    }
    const Call call = options.call(tensors);
    if (!apply_to_halves(grad_output, call, mask, result)) {
      Gradients gradients = options.op->backward(grad_output, call, mask);
      std::move(gradients.begin(), gradients.begin() + inputs(), result.begin());
    }
    return result;
  }

  // Adds edges to the tensors that pairs of inputs are halves of, after the edges to the inputs.
  void add_edges_of_halves(NamedTensors arguments) {
    for (size_t pair = 0; pair < arguments.size() / 2; ++pair) {
      const size_t i = 2 * pair;
      halves[pair] = find_halves(arguments[i].tensor, arguments[i + 1].tensor, next_edge(i), next_edge(i + 1));
      if (halves[pair]) {
        add_next_edge(next_edge(i).function->next_edge(0));
      }
    }
  }

  std::array<std::optional<Halves>, kMaxInputs / 2> halves;

 private:
  // Writes the gradients of halves into that of the whole tensor, where nobody can tell; returns false if it wrote none.
  bool apply_to_halves(const at::Tensor& grad_output, const Call& call, const Mask& mask, variable_list& result) {
    if (num_outputs() == inputs() || is_result_observed(*this) || at::GradMode::is_enabled() ||
        at::areAnyTensorSubclassLike({grad_output}) || grad_output._fw_grad(/*level=*/0).defined()) {
      return false;
    }
    for (const auto& [name, tensor] : call.tensors) {
      if (at::areAnyTensorSubclassLike({tensor}) || tensor._fw_grad(/*level=*/0).defined()) {
        return false;
      }
    }
    const NamedTensors arguments = call.inputs();
    Gradients gradients;
    size_t edge = inputs();
    bool any_whole = false;
    for (size_t pair = 0; pair < inputs() / 2; ++pair) {
      const size_t i = 2 * pair;
      const auto& of_mu = next_edge(i);
      const auto& of_log_var = next_edge(i + 1);
      if (halves[pair] && task_should_compute_output(edge++) && mask[i] && mask[i + 1] &&
          are_unchanged(arguments[i].tensor, arguments[i + 1].tensor, of_mu, of_log_var) && !is_observed(*of_mu.function) &&
          !is_observed(*of_log_var.function)) {
        std::tie(result[edge - 1], gradients[i], gradients[i + 1]) =
            std::tuple_cat(halves[pair]->allocate(arguments[i].tensor));
        any_whole = true;
      }
    }
    if (!any_whole) {
      return false;
    }
    for (size_t i = 0; i < inputs(); ++i) {
      if (mask[i] && !gradients[i].defined()) {
        gradients[i] = result[i] = allocate_like(arguments[i].tensor);
      }
    }
    options.op->backward_out(grad_output, call, gradients);
    return true;
  }
};

// The inputs that the wanted gradients depend on. All inputs if one is jagged: the stand-in for an input that is not saved
// cannot be given a ragged shape.
Mask needed_by_gradients(const Call& call) {
  const NamedTensors inputs = call.inputs();
  const bool any_jagged =
      std::any_of(inputs.begin(), inputs.end(), [](const NamedTensor& input) { return input.tensor.layout() == at::kJagged; });
  if (any_jagged) {
    return {true, true, true, true};
  }
  const auto& needs = derivatives_of(call.formula()).needs;
  Mask needed{};
  for (size_t i = 0; i < inputs.size(); ++i) {
    for (size_t j = 0; j < inputs.size() && inputs[i].tensor.requires_grad(); ++j) {
      needed[j] |= needs[i][j];
    }
  }
  return needed;
}

void check_is_constant(const char* function, const at::Tensor& weight) {
  const bool is_differentiated =
      (at::GradMode::is_enabled() && weight.requires_grad()) || weight._fw_grad(/*level=*/0).defined();
  TORCH_CHECK(!is_differentiated, function,
              ": expected weight not to require grad, for weights are not differentiated. Pass weight.detach(), or multiply "
              "the terms of reduction=\"none\" with the weight");
}

void check(const char* function, const Call& call) {
  check_together(function, call);
  check_tensors(function, call.inputs());
  check_clamp(function, call.clamp_min, call.clamp_max);
  check_result_dtype(function, call.dtype);
  if (call.has_weight) {
    check_weight(function, *call.weight());
    check_is_constant(function, *call.weight());
  }
}

struct Autograd {
  static at::Tensor forward(const Call& call) {
    check(call.op->description.name, call);
    at::Tensor result = [&] {
      const at::AutoDispatchBelowADInplaceOrView guard;
      return call.op->forward(call);
    }();
    const NamedTensors inputs = call.inputs();
    if (any_requires_grad(inputs)) {
      auto node = make_node<BackwardNode>(inputs);
      node->options.read(call);
      const Mask needed = needed_by_gradients(call);
      bool are_all_needed = true;
      for (size_t i = 0; i < inputs.size(); ++i) {
        node->save(inputs[i].tensor, needed[i]);
        are_all_needed &= needed[i];
      }
      if (call.has_weight) {
        node->save(*call.weight(), true);
      }
      node->add_edges_of_halves(inputs);
      if (call.op->description.reduces && !are_all_needed) {
        c10::SymDimVector shape(inputs[0].tensor.sym_sizes());
        for (const auto& [name, tensor] : inputs) {
          shape = at::infer_size_symdimvector(shape, tensor.sym_sizes());
        }
        node->shape.assign(shape.begin(), shape.end());
      }
      record(result, node);
    }
    if (any_has_tangent(inputs)) {
      const Options options(call);
      const Derived derived(options, primals_of(call.tensors));
      result._set_fw_grad(derived.directional(tangents_of(inputs), result), /*level=*/0, /*is_inplace_op=*/false);
    }
    return result;
  }

  static Gradients backward(const at::Tensor& grad_output, const Call& call, const Mask& mask) {
    const char* const function = call.op->backward_name;
    check_tensors(function, NamedTensor{"grad_output", grad_output});
    check(function, call);
    Gradients gradients = [&] {
      const at::AutoDispatchBelowADInplaceOrView guard;
      return call.op->backward(grad_output, call, mask);
    }();
    const NamedTensors inputs = call.inputs();
    c10::SmallVector<NamedTensor, kMaxTensors> differentiated{{"grad_output", grad_output}};
    differentiated.append(inputs.begin(), inputs.end());
    if (any_requires_grad(differentiated)) {
      auto node = make_node<BackwardBackward>(differentiated);
      node->options.read(call);
      node->save(grad_output, true);
      for (const auto& [name, tensor] : call.tensors) {
        node->save(tensor, true);
      }
      record(at::TensorList(gradients.data(), inputs.size()), node);
    }
    const at::Tensor grad_tangent = grad_output._fw_grad(/*level=*/0);
    const Tensors tangents = tangents_of(inputs);
    if (grad_tangent.defined() || any_defined(tangents)) {
      const Options options(call);
      const Derived derived(options, primals_of(call.tensors));
      Tensors from_inputs(inputs.size());
      if (any_defined(tangents)) {
        from_inputs = derived.second_order(grad_output._fw_primal(/*level=*/0), tangents, mask);
      }
      Gradients from_grad;
      if (grad_tangent.defined()) {
        from_grad = derived.backward(grad_tangent, mask);
      }
      for (size_t i = 0; i < inputs.size(); ++i) {
        const at::Tensor tangent = sum_of(from_inputs[i], from_grad[i]);
        if (mask[i] && tangent.defined()) {
          gradients[i]._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
        }
      }
    }
    return gradients;
  }

  // Not differentiable, like torch's own operators with an out argument.
  static void backward_out(const at::Tensor& grad_output, const Call& call, const Gradients& gradients) {
    const auto requires_grad = [](const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); };
    const bool records = at::GradMode::is_enabled() && (requires_grad(grad_output) || any_requires_grad(call.inputs()) ||
                                                        std::any_of(gradients.begin(), gradients.end(), requires_grad));
    TORCH_CHECK(!records, call.op->backward_name,
                ": expected no tensor to require grad where gradients are given, which are not ", "differentiated");
    check_together(call.op->backward_name, call);
    if (call.has_weight) {
      check_is_constant(call.op->backward_name, *call.weight());
    }
    const at::AutoDispatchBelowADInplaceOrView guard;
    call.op->backward_out(grad_output, call, gradients);
  }
};

TORCH_LIBRARY_IMPL(kl_ext, Autograd, m) { register_layer<Autograd>(m); }

} // namespace
} // namespace kl_ext::autograd
