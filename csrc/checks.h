// Argument checks. All messages have one form: `function: expected ARGUMENT to be WHAT, got WHAT CAME`. As in torch, a wrong
// kind of tensor is a TypeError, a wrong number a ValueError, a wrong shape or device a RuntimeError.
#pragma once

#include <ATen/ExpandUtils.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>

#include "overlap.h"

namespace kl_ext {

// A tensor that belongs to the caller, under its name.
struct NamedTensor {
  NamedTensor(const char* tensor_name, const at::Tensor& of_caller) : name(tensor_name), tensor(of_caller) {}
  NamedTensor(const NamedTensor&) = default;
  NamedTensor& operator=(const NamedTensor& other) { return *std::construct_at(this, other); }

  const char* name;
  const at::Tensor& tensor;
};

using NamedTensors = c10::ArrayRef<NamedTensor>;

inline bool is_supported(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble;
}

// The name Python prints for a dtype, without "torch.".
std::string dtype_name(at::ScalarType dtype);

// The name Python prints for a layout.
std::string layout_name(at::Layout layout);

inline void check_clamp(const char* function, double clamp_min, double clamp_max) {
  TORCH_CHECK_VALUE(clamp_min <= clamp_max, function, ": expected clamp_min <= clamp_max, got ", clamp_min, " and ", clamp_max);
}

inline void check_result_dtype(const char* function, std::optional<at::ScalarType> dtype) {
  TORCH_CHECK_TYPE(!dtype || is_supported(*dtype), function,
                   ": expected dtype to be float16, bfloat16, float32 or float64, got ", dtype_name(*dtype));
}

inline void check_tensors(const char* function, NamedTensors arguments) {
  for (const auto& [name, tensor] : arguments) {
    TORCH_CHECK_TYPE(is_supported(tensor.scalar_type()), function, ": expected ", name,
                     " to be a float16, bfloat16, float32 or float64 tensor, got ", dtype_name(tensor.scalar_type()));
    TORCH_CHECK_TYPE(tensor.layout() == at::kStrided || tensor.layout() == at::kJagged, function, ": expected ", name,
                     " to be a strided tensor, got ", layout_name(tensor.layout()));
  }
}

inline bool is_weight(const NamedTensor& argument) { return argument.name == std::string_view("weight"); }

inline void check_weight(const char* function, const at::Tensor& weight) {
  const at::ScalarType dtype = weight.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kBool || is_supported(dtype), function,
                   ": expected weight to be a bool, float16, bfloat16, float32 or float64 tensor, got ", dtype_name(dtype));
  TORCH_CHECK_TYPE(weight.layout() == at::kStrided || weight.layout() == at::kJagged, function,
                   ": expected weight to be a strided tensor, got ", layout_name(weight.layout()));
}

// Checks that all tensors are on one device and returns it. 0-dim CPU tensors go with tensors of any device, as in torch.
inline at::Device check_devices(const char* function, NamedTensors arguments) {
  const NamedTensor* first = &arguments[0];
  for (const auto& argument : arguments) {
    const bool is_scalar = argument.tensor.dim() == 0 && argument.tensor.is_cpu();
    if (is_scalar || argument.tensor.device() == first->tensor.device()) {
      continue;
    }
    const bool first_is_scalar = first->tensor.dim() == 0 && first->tensor.is_cpu();
    TORCH_CHECK(first_is_scalar, function, ": expected ", argument.name, " on ", first->tensor.device(), " like ", first->name,
                ", got ", argument.tensor.device());
    first = &argument;
  }
  return first->tensor.device();
}

// The common shape of arguments that are known to broadcast.
inline at::DimVector broadcast_shape(NamedTensors arguments) {
  at::DimVector shape(arguments[0].tensor.sizes());
  for (const auto& argument : arguments.slice(1)) {
    const auto sizes = argument.tensor.sizes();
    if (sizes.size() > shape.size()) {
      shape.insert(shape.begin(), sizes.size() - shape.size(), 1);
    }
    for (size_t back = 1; back <= sizes.size(); ++back) {
      int64_t& common = shape[shape.size() - back];
      common = common == 1 ? sizes[sizes.size() - back] : common;
    }
  }
  return shape;
}

inline void check_broadcast(const char* function, NamedTensors arguments) {
  for (size_t count = 1; count < arguments.size(); ++count) {
    const auto& [name, tensor] = arguments[count];
    const auto sizes = tensor.sizes();
    if (sizes == arguments[0].tensor.sizes()) {
      continue;
    }
    const at::DimVector shape = broadcast_shape(arguments.slice(0, count));
    for (size_t back = 1; back <= std::min(shape.size(), sizes.size()); ++back) {
      const int64_t left = shape[shape.size() - back];
      const int64_t right = sizes[sizes.size() - back];
      TORCH_CHECK(left == right || left == 1 || right == 1, function, ": expected ", name, " to broadcast with the shape ",
                  at::IntArrayRef(shape), " of the arguments before it, got shape ", sizes);
    }
  }
}

// The arguments after the first, which is grad_output, must expand to its shape.
inline void check_expand(const char* function, NamedTensors arguments) {
  const auto shape = arguments[0].tensor.sizes();
  for (const auto& [name, tensor] : arguments.slice(1)) {
    TORCH_CHECK(tensor.sizes() == shape || at::is_expandable_to(tensor.sizes(), shape), function, ": expected ", name,
                " to expand to the shape ", shape, " of grad_output, got shape ", tensor.sizes());
  }
}

// A weight broadcasts with the terms and never enlarges them.
inline void check_weight_shape(const char* function, const at::Tensor& weight, at::IntArrayRef shape) {
  TORCH_CHECK(at::is_expandable_to(weight.sizes(), shape), function, ": expected weight to expand to the shape ", shape,
              " of the terms, got shape ", weight.sizes());
}

// grad_output of a reduction: of the shape of the result, on the inputs' device.
inline void check_grad_output(const char* function, NamedTensor grad_output, NamedTensors inputs, at::IntArrayRef shape) {
  check_tensors(function, grad_output);
  const NamedTensor both[] = {inputs[0], grad_output};
  check_devices(function, both);
  TORCH_CHECK(grad_output.tensor.sizes() == shape, function, ": expected grad_output of shape ", shape, ", got shape ",
              grad_output.tensor.sizes());
}

inline Overlap overlap_of(const at::Tensor& a, const at::Tensor& b) {
  if (!a.storage().is_alias_of(b.storage())) {
    return Overlap::kNone;
  }
  const auto placement = [](const at::Tensor& tensor) {
    return Placement{tensor.sizes(), tensor.strides(), tensor.storage_offset(), static_cast<int64_t>(tensor.element_size())};
  };
  return overlap_of(placement(a), placement(b));
}

inline bool shares_memory(const at::Tensor& a, const at::Tensor& b) { return overlap_of(a, b) != Overlap::kNone; }

// A tensor that is to receive the gradient of an input.
inline void check_gradient(const char* function, const at::Tensor& gradient, NamedTensor input) {
  const auto& [name, tensor] = input;
  TORCH_CHECK_TYPE(gradient.scalar_type() == tensor.scalar_type(), function, ": expected grad_", name, " to be ",
                   dtype_name(tensor.scalar_type()), " like ", name, ", got ", dtype_name(gradient.scalar_type()));
  TORCH_CHECK(gradient.device() == tensor.device(), function, ": expected grad_", name, " on ", tensor.device(), " like ", name,
              ", got ", gradient.device());
  TORCH_CHECK(gradient.sizes() == tensor.sizes(), function, ": expected grad_", name, " of shape ", tensor.sizes(), " like ",
              name, ", got shape ", gradient.sizes());
  at::assert_no_internal_overlap(gradient);
}

// The tensors that are to receive gradients, undefined where one is not wanted. As with torch.add(out=), a gradient may be the
// same tensor as an argument, unless it is a sum over terms of a larger shape: that is written while the arguments are read.
// read: grad_output, the inputs and the weight.
inline void check_gradients(const char* function, NamedTensors inputs, NamedTensors read, c10::ArrayRef<at::Tensor> gradients,
                            at::IntArrayRef shape) {
  for (size_t i = 0; i < inputs.size(); ++i) {
    const at::Tensor& gradient = gradients[i];
    if (!gradient.defined()) {
      continue;
    }
    check_gradient(function, gradient, inputs[i]);
    for (const auto& argument : read) {
      const Overlap overlap = overlap_of(gradient, argument.tensor);
      TORCH_CHECK(overlap != Overlap::kPartial, function, ": expected grad_", inputs[i].name, " to be ", argument.name,
                  " itself or to share no memory with it, got a partial overlap");
      TORCH_CHECK(overlap == Overlap::kNone || gradient.sizes() == shape, function, ": expected grad_", inputs[i].name,
                  ", which is a sum, to share no memory with ", argument.name, ", got the same memory");
    }
    for (size_t j = 0; j < i; ++j) {
      TORCH_CHECK(!gradients[j].defined() || !shares_memory(gradient, gradients[j]), function, ": expected grad_",
                  inputs[i].name, " to share no memory with grad_", inputs[j].name, ", got tensors that overlap");
    }
  }
}

} // namespace kl_ext
