// The schemas of the operators, the typed handles to call them, and the errors where no kernel exists.
#include "signature.h"

namespace kl_ext {

std::string dtype_name(at::ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }

std::string layout_name(at::Layout layout) {
  switch (layout) {
    case at::kSparse:
      return "torch.sparse_coo";
    case at::kSparseCsr:
      return "torch.sparse_csr";
    case at::kSparseCsc:
      return "torch.sparse_csc";
    case at::kSparseBsr:
      return "torch.sparse_bsr";
    case at::kSparseBsc:
      return "torch.sparse_bsc";
    case at::kMkldnn:
      return "torch._mkldnn";
    default:
      return c10::str(layout);
  }
}

namespace {

// Refuses tensors that no backend of ours takes, and names the argument. Dtype and layout are checked before the device,
// because a sparse tensor can come here together with dense ones on a device that has kernels.
void refuse(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string function = schema.name().substr(schema.name().find("::") + 2);
  const bool has_cuda = op.hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  const char* const devices = has_cuda ? "cpu or cuda" : "cpu (this build has no CUDA kernels)";
  const auto values = torch::jit::last(*stack, schema.arguments().size());
  std::vector<NamedTensor> tensors;
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i].isTensor()) {
      tensors.push_back({schema.arguments()[i].name().c_str(), values[i].toTensor()});
    }
  }
  for (const auto& argument : tensors) {
    is_weight(argument) ? check_weight(function.c_str(), argument.tensor) : check_tensors(function.c_str(), argument);
  }
  for (const auto& [name, tensor] : tensors) {
    TORCH_CHECK(tensor.is_cpu() || (has_cuda && tensor.is_cuda()), function, ": expected ", name, " on ", devices, ", got ",
                tensor.device());
  }
  TORCH_CHECK(false, function, ": expected tensors that hold their numbers, on ", devices);
}

// Resolves inputs that have the negative bit, for operators that write into given tensors. torch's own fallback serves all
// other operators, but fails for those that return nothing. Tensors that are written to keep their bit.
void resolve_negative_inputs(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& value = *(stack->end() - static_cast<std::ptrdiff_t>(arguments.size() - i));
    if (value.isTensor() && arguments[i].alias_info() == nullptr) {
      value = value.toTensor().resolve_neg();
    }
  }
  op.redispatchBoxed(keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::Negative), stack);
}

// The schemas of an operator.
class Schemas {
 public:
  explicit Schemas(const Description& description) : d_(description) {}

  std::string forward() const {
    std::string inputs;
    for (size_t i = 0; i < d_.most; ++i) {
      inputs += c10::str(i < d_.least ? "Tensor " : "Tensor? ", d_.inputs[i], i < d_.least ? ", " : "=None, ");
    }
    return c10::str(d_.name, "(", inputs, d_.reduces ? "Tensor? weight=None, " : "", "*, ",
                    d_.clamps ? "float clamp_min=-30.0, float clamp_max=20.0, " : "",
                    d_.reduces ? "str reduction=\"none\", int[]? dim=None, bool keepdim=False, " : "",
                    "ScalarType? dtype=None) -> Tensor");
  }

  std::string backward() const {
    return c10::str(d_.name, "_backward(", arguments(), ", bool[", d_.most, "] output_mask",
                    d_.reduces ? ", bool keepdim=False, Tensor? weight=None" : "", ") -> (", results(), ")");
  }

  std::string backward_out() const {
    std::string gradients;
    for (size_t i = 0; i < d_.most; ++i) {
      gradients += c10::str(i > 0 ? ", " : "", "Tensor(", static_cast<char>('a' + i), "!)? grad_", d_.inputs[i]);
    }
    return c10::str(d_.name, "_backward.out(", arguments(), d_.reduces ? ", bool keepdim=False, Tensor? weight=None" : "",
                    ", *, ", gradients, ") -> ()");
  }

 private:
  std::string arguments() const {
    std::string inputs = "Tensor grad_output";
    for (size_t i = 0; i < d_.most; ++i) {
      inputs += c10::str(", Tensor", i < d_.least ? " " : "? ", d_.inputs[i]);
    }
    return inputs + (d_.clamps ? ", float clamp_min, float clamp_max" : "") + (d_.reduces ? ", str reduction, int[]? dim" : "");
  }

  std::string results() const {
    std::string all = "Tensor";
    for (size_t i = 1; i < d_.most; ++i) {
      all += ", Tensor";
    }
    return all;
  }

  const Description& d_;
};

} // namespace

TORCH_LIBRARY(kl_ext, m) {
  const std::vector<at::Tag> compliant = {at::Tag::pt2_compliant_tag};
  const std::vector<at::Tag> elementwise = {at::Tag::pt2_compliant_tag, at::Tag::pointwise};
  for_each_operator(Operators(), [&]<const Description & d>() {
    const Schemas schemas(d);
    m.def(schemas.forward().c_str(), d.reduces ? compliant : elementwise);
    m.def(schemas.backward().c_str(), compliant);
    m.def(schemas.backward_out().c_str(), compliant);
  });
  find_handles();
}

TORCH_LIBRARY_IMPL(kl_ext, CompositeExplicitAutograd, m) {
  for_each_operator(Operators(), [&]<const Description & d>() {
    for (const char* const end : {"", "_backward", "_backward.out"}) {
      m.impl(c10::str(d.name, end).c_str(), torch::CppFunction::makeFromBoxedFunction<&refuse>());
    }
  });
}

TORCH_LIBRARY_IMPL(kl_ext, Negative, m) {
  for_each_operator(Operators(), [&]<const Description & d>() {
    m.impl(c10::str(d.name, "_backward.out").c_str(), torch::CppFunction::makeFromBoxedFunction<&resolve_negative_inputs>());
  });
}

} // namespace kl_ext
