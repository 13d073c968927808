// Derivatives of every kind of every operator: reverse mode, forward mode, second order.
//
// First derivatives of any kind come from the backward operator, so that they have the same bits in reverse and forward mode,
// with and without create_graph; second ones from the curvature (formulas.h), and higher ones from differentiating that.
#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/new_zeros.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>

#include <cctype>

#include "../memory.h"
#include "../plan.h"
#include "../reduction.h"
#include "formulas.h"
#include "halves.h"

namespace kl_ext::autograd {
namespace {

bool any(const Mask& flags) {
  return std::any_of(flags.begin(), flags.end(), [](bool flag) { return flag; });
}

bool any_defined(const Tensors& tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& tensor) { return tensor.defined(); });
}

at::Tensor sum_of(const at::Tensor& a, const at::Tensor& b) { return !a.defined() ? b : !b.defined() ? a : a + b; }

// The forward-mode tangents, undefined where there is none, and the tensors without them.
Tensors tangents_of(Arguments arguments) {
  Tensors tangents;
  for (const auto& [name, tensor] : arguments) {
    tangents.push_back(tensor._fw_grad(/*level=*/0));
  }
  return tangents;
}

bool any_has_tangent(Arguments arguments) {
  return std::any_of(arguments.begin(), arguments.end(),
                     [](const Argument& argument) { return argument.tensor._fw_grad(/*level=*/0).defined(); });
}

Tensors primals_of(Arguments arguments) {
  Tensors primals;
  for (const auto& [name, tensor] : arguments) {
    primals.push_back(tensor._fw_primal(/*level=*/0));
  }
  return primals;
}

// Of what is differentiated: the inputs and the weight of a call, and what the call says of them.
class Derived {
 public:
  // tensors: the inputs and the weight.
  Derived(const Options& options, const Tensors& tensors) : options_(options) {
    const size_t inputs = tensors.size() - (options.has_weight ? 1 : 0);
    inputs_.assign(tensors.begin(), tensors.begin() + inputs);
    weight_ = options.has_weight ? tensors.back() : at::Tensor();
  }

  // That of grad_output, unless it is reduced: then all inputs are there to tell.
  c10::SymDimVector shape_of_terms(const at::Tensor& grad_output) const {
    c10::SymDimVector shape((reduces() ? inputs_[0] : grad_output).sym_sizes());
    for (const auto& input : inputs_) {
      shape = at::infer_size_symdimvector(shape, input.sym_sizes());
    }
    return shape;
  }

  // The derivative of the result in the direction v: the sum over i of v_i dterm/dinput_i, reduced as the terms are. Like: a tensor
  // of the result's dtype and device.
  at::Tensor directional(const Tensors& v, const at::Tensor& like) const {
    const auto shape = shape_of_terms(like);
    const auto arithmetic = arithmetic_type(named(), like.scalar_type());
    Tensors expanded;
    for (const auto& input : inputs_) {
      expanded.push_back(input.to(arithmetic).expand_symint(shape));
    }
    Mask mask{};
    for (size_t i = 0; i < v.size(); ++i) {
      mask[i] = v[i].defined();
    }
    const at::Tensor one = at::ones({}, like.options().dtype(arithmetic)).expand_symint(shape);
    const Gradients derivatives = backward_of_terms(one, expanded, mask);
    at::Tensor sum;
    for (size_t i = 0; i < v.size(); ++i) {
      if (v[i].defined()) {
        sum = sum_of(sum, derivatives[i] * v[i]);
      }
    }
    return reduce(without_left_out(sum, shape), shape, arithmetic).to(like.options());
  }

  // grad_output times the Hessian times v, summed to the shapes of the inputs; undefined where it is zero or not wanted.
  Tensors second_order(const at::Tensor& grad_output, const Tensors& v, const Mask& wanted) const {
    const auto shape = shape_of_terms(grad_output);
    const auto arithmetic = arithmetic_type(named());
    const AnyDerivatives& derivatives = derivatives_of(options_.formula);
    Tensors operands;
    Tensors directions;
    for (size_t i = 0; i < inputs_.size(); ++i) {
      operands.push_back(harmless(inputs_[i].to(arithmetic), derivatives.harmless[i], shape));
      directions.push_back(v[i].defined() ? without_left_out(v[i].to(arithmetic), shape) : at::Tensor());
    }
    at::Tensor grad_terms = unreduce(grad_output.to(arithmetic), shape, arithmetic);
    if (weight_.defined()) {
      grad_terms = without_left_out(grad_terms.expand_symint(shape) * weight_, shape);
    }
    Tensors rows = derivatives.curvature(options_, operands, directions);
    for (size_t i = 0; i < inputs_.size(); ++i) {
      if (rows[i].defined()) {
        rows[i] = wanted[i]
                      ? at::sum_to(grad_terms * rows[i].expand_symint(shape), inputs_[i].sym_sizes()).to(inputs_[i].options())
                      : at::Tensor();
      }
    }
    return rows;
  }

  // The gradients of the inputs from that of the result.
  Gradients backward(const at::Tensor& grad_output, const Mask& mask) const {
    const Tensors all = tensors();
    return options_.op->backward(grad_output, options_.call(all), mask);
  }

 private:
  bool reduces() const { return options_.op->description.reduces; }

  Tensors tensors() const {
    Tensors all = inputs_;
    if (weight_.defined()) {
      all.push_back(weight_);
    }
    return all;
  }

  c10::SmallVector<Argument, kMaxTensors> named() const {
    c10::SmallVector<Argument, kMaxTensors> arguments;
    for (const auto& input : inputs_) {
      arguments.push_back({"input", input});
    }
    if (weight_.defined()) {
      arguments.push_back({"weight", weight_});
    }
    return arguments;
  }

  // From the gradient of each term.
  Gradients backward_of_terms(const at::Tensor& grad_terms, const Tensors& expanded, const Mask& mask) const {
    Tensors all = expanded;
    if (weight_.defined()) {
      all.push_back(weight_);
    }
    Call call = options_.call(all);
    call.reduction = "none";
    call.dim = std::nullopt;
    call.keepdim = false;
    return options_.op->backward(grad_terms, call, mask);
  }

  // A term that is left out is 0, whatever its inputs and their directions are.
  at::Tensor without_left_out(const at::Tensor& terms, c10::SymIntArrayRef shape) const {
    return weight_.defined() ? at::where(weight_ != 0, terms.expand_symint(shape), 0.0) : terms;
  }

  // The same for inputs: no NaN may come from what is left out, which a derivative would multiply with 0.
  at::Tensor harmless(const at::Tensor& input, double number, c10::SymIntArrayRef shape) const {
    return weight_.defined() ? at::where(weight_ != 0, input.expand_symint(shape), number) : input;
  }

  Reduction reduction(size_t rank) const {
    return parse_reduction(options_.op->description.name, options_.reduction,
                           options_.dim ? at::OptionalIntArrayRef(*options_.dim) : std::nullopt, static_cast<int64_t>(rank));
  }

  static at::DimVector dims_of(const Reduction& reduction) {
    at::DimVector dims;
    for (size_t dim = 0; dim < reduction.reduced.size(); ++dim) {
      if (reduction.reduced[dim]) {
        dims.push_back(static_cast<int64_t>(dim));
      }
    }
    return dims;
  }

  // By what a mean is divided, for terms that keep their reduced dimensions with size 1 or not.
  at::Tensor quotient_of(const at::Tensor& sum, const Reduction& how, c10::SymIntArrayRef shape, at::ScalarType arithmetic,
                         bool keepdim) const {
    if (!how.divides) {
      return sum;
    }
    if (!how.divides_by_weights(weight_.defined())) {
      return quotient(sum, how.divisor(shape));
    }
    const at::Tensor weights = weight_.to(arithmetic).expand_symint(shape);
    return sum / nan_for_zero(shape.empty() ? weights : at::sum(weights, dims_of(how), keepdim));
  }

  at::Tensor reduce(const at::Tensor& terms, c10::SymIntArrayRef shape, at::ScalarType arithmetic) const {
    if (!reduces()) {
      return terms;
    }
    const Reduction how = reduction(shape.size());
    if (how.is_none) {
      return terms;
    }
    const at::Tensor sum = shape.empty() ? terms : at::sum(terms, dims_of(how), options_.keepdim);
    return quotient_of(sum, how, shape, arithmetic, options_.keepdim);
  }

  // The gradient of the terms, broadcasting with them.
  at::Tensor unreduce(const at::Tensor& grad_output, c10::SymIntArrayRef shape, at::ScalarType arithmetic) const {
    if (!reduces()) {
      return grad_output;
    }
    const Reduction how = reduction(shape.size());
    const at::Tensor divided = quotient_of(grad_output, how, shape, arithmetic, options_.keepdim);
    return options_.keepdim ? divided : how.unsqueeze(divided);
  }

  const Options& options_;
  Tensors inputs_;
  at::Tensor weight_;
};

// "KlDivSingleLossBackward" of kl_div_single_loss; of an operator that takes q or not, "StandardGaussianKlDivBackward" without.
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

struct Backward : SavingNode {
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
      if (!tensors[i].defined()) { // no wanted gradient depends on it, but for the shape of the terms: any number does
        // Of grad_output, not of its device, which compiled autograd does not know yet.
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

  // Edges to what pairs of inputs are halves of, after those to the inputs.
  void add_edges_of_halves(Arguments arguments) {
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
  // Writes the gradients of halves into that of the whole, where nobody can tell; false if there are none.
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
    const Arguments arguments = call.inputs();
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

// The inputs that the gradients of those that require one depend on. All of them where one is jagged: what stands in for an input
// that is not saved cannot be given a ragged shape.
Mask needed_by_gradients(const Call& call) {
  const Arguments inputs = call.inputs();
  const bool any_jagged =
      std::any_of(inputs.begin(), inputs.end(), [](const Argument& input) { return input.tensor.layout() == at::kJagged; });
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

void check(const char* function, const Call& call) {
  check_together(function, call);
  check_tensors(function, call.inputs());
  check_clamp(function, call.clamp_min, call.clamp_max);
  check_result_dtype(function, call.dtype);
  if (call.has_weight) {
    const at::Tensor& weight = *call.weight();
    check_weight(function, weight);
    const bool is_differentiated =
        (at::GradMode::is_enabled() && weight.requires_grad()) || weight._fw_grad(/*level=*/0).defined();
    TORCH_CHECK(!is_differentiated, function,
                ": expected weight not to require grad, for weights are not differentiated. Pass weight.detach(), or multiply "
                "the terms of reduction=\"none\" with the weight");
  }
}

struct Autograd {
  static at::Tensor forward(const Call& call) {
    check(call.op->description.name, call);
    at::Tensor result = [&] {
      const at::AutoDispatchBelowADInplaceOrView guard;
      return call.op->forward(call);
    }();
    const Arguments inputs = call.inputs();
    if (any_requires_grad(inputs)) {
      auto node = make_node<Backward>(inputs);
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
    check_tensors(function, Argument{"grad_output", grad_output});
    check(function, call);
    Gradients gradients = [&] {
      const at::AutoDispatchBelowADInplaceOrView guard;
      return call.op->backward(grad_output, call, mask);
    }();
    const Arguments inputs = call.inputs();
    c10::SmallVector<Argument, kMaxTensors> differentiated{{"grad_output", grad_output}};
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

  // What has no derivatives: as torch's own operators with an out argument.
  static void backward_out(const at::Tensor& grad_output, const Call& call, const Gradients& gradients) {
    const auto requires_grad = [](const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); };
    const bool records = at::GradMode::is_enabled() && (requires_grad(grad_output) || any_requires_grad(call.inputs()) ||
                                                        std::any_of(gradients.begin(), gradients.end(), requires_grad));
    TORCH_CHECK(!records, call.op->backward_name,
                ": expected no tensor to require grad where gradients are given, which are not ", "differentiated");
    check(call.op->backward_name, call);
    const at::AutoDispatchBelowADInplaceOrView guard;
    call.op->backward_out(grad_output, call, gradients);
  }
};

TORCH_LIBRARY_IMPL(kl_ext, Autograd, m) { register_layer<Autograd>(m); }

} // namespace
} // namespace kl_ext::autograd
