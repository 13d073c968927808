// How the functions of an operator follow from its description: their types, the handles to call them, and the registration of
// a layer's kernels.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <tuple>

#include "operators.h"

namespace kl_ext {

namespace signature {

template <class... Lists>
using Joined = decltype(std::tuple_cat(std::declval<Lists>()...));

template <bool is_there, class... Types>
using If = std::conditional_t<is_there, std::tuple<Types...>, std::tuple<>>;

template <class Result, class List>
struct FunctionOf;

template <class Result, class... Types>
struct FunctionOf<Result, std::tuple<Types...>> {
  using Type = Result(Types...);
};

template <const Description& d, class = std::make_index_sequence<d.most>>
struct Types;

template <const Description& d, size_t... I>
struct Types<d, std::index_sequence<I...>> {
  using MaybeTensor = const std::optional<at::Tensor>&;
  using Inputs = std::tuple<std::conditional_t<(I < d.least), const at::Tensor&, MaybeTensor>...>;
  using Weight = If<d.reduces, MaybeTensor>;
  using Clamp = If<d.clamps, double, double>;
  using Reduction = If<d.reduces, std::string_view, at::OptionalIntArrayRef>;
  using Keepdim = If<d.reduces, bool>;
  using GradOutput = std::tuple<const at::Tensor&>;
  using Given = std::tuple<std::conditional_t<I == I, MaybeTensor, void>...>; // a gradient for each input
  using Results = std::tuple<std::conditional_t<I == I, at::Tensor, void>...>;

  using ForwardType =
      typename FunctionOf<at::Tensor,
                          Joined<Inputs, Weight, Clamp, Reduction, Keepdim, std::tuple<std::optional<at::ScalarType>>>>::Type;
  using BackwardType = typename FunctionOf<
      Results, Joined<GradOutput, Inputs, Clamp, Reduction, std::tuple<std::array<bool, d.most>>, Keepdim, Weight>>::Type;
  using BackwardOutType = typename FunctionOf<void, Joined<GradOutput, Inputs, Clamp, Reduction, Keepdim, Weight, Given>>::Type;
};

template <const Description& d>
using ForwardType = typename Types<d>::ForwardType;
template <const Description& d>
using BackwardType = typename Types<d>::BackwardType;
template <const Description& d>
using BackwardOutType = typename Types<d>::BackwardOutType;

// Set by find_handles while the library is loaded, so that no call takes a lock to look them up.
template <class Function>
struct Handle {
  void find(const char* name, const char* overload) {
    typed = c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Function>();
  }

  std::optional<c10::TypedOperatorHandle<Function>> typed;
};

template <const Description& d>
inline constinit Handle<ForwardType<d>> forward_handle;
template <const Description& d>
inline constinit Handle<BackwardType<d>> backward_handle;
template <const Description& d>
inline constinit Handle<BackwardOutType<d>> backward_out_handle;

// From a call to the arguments of an operator.

inline std::optional<at::Tensor> optional(const at::Tensor* tensor) {
  return tensor != nullptr && tensor->defined() ? std::optional(*tensor) : std::nullopt;
}

template <const Description& d, size_t i>
decltype(auto) input_of(const Call& call) {
  if constexpr (i < d.least) {
    return (call.tensors[i].tensor); // a reference
  } else {
    return optional(call.input(i));
  }
}

template <const Description& d>
auto inputs_of(const Call& call) {
  return [&]<size_t... I>(std::index_sequence<I...>) {
    return std::tuple<decltype(input_of<d, I>(call))...>(input_of<d, I>(call)...);
  }(std::make_index_sequence<d.most>());
}

template <bool is_there, class... Values>
auto tuple_if(Values... values) {
  if constexpr (is_there) {
    return std::tuple(std::move(values)...);
  } else {
    return std::tuple();
  }
}

template <const Description& d>
auto arguments_of(const Call& call) {
  return std::tuple_cat(inputs_of<d>(call), tuple_if<d.clamps>(call.clamp_min, call.clamp_max),
                        tuple_if<d.reduces>(call.reduction, call.dim));
}

template <class Function, class Values>
decltype(auto) call_with(const Handle<Function>& handle, Values&& values) {
  return std::apply([&](auto&&... value) { return handle.typed->call(std::forward<decltype(value)>(value)...); },
                    std::forward<Values>(values));
}

template <const Description& d>
at::Tensor forward(const Call& call) {
  return call_with(forward_handle<d>,
                   std::tuple_cat(inputs_of<d>(call), tuple_if<d.reduces>(optional(call.weight())),
                                  tuple_if<d.clamps>(call.clamp_min, call.clamp_max),
                                  tuple_if<d.reduces>(call.reduction, call.dim, call.keepdim), std::tuple(call.dtype)));
}

template <const Description& d>
Gradients backward(const at::Tensor& grad_output, const Call& call, Mask mask) {
  std::array<bool, d.most> output_mask;
  std::copy_n(mask.begin(), d.most, output_mask.begin());
  return std::apply(
      [](auto&&... gradient) { return Gradients{std::move(gradient)...}; },
      call_with(backward_handle<d>, std::tuple_cat(std::tie(grad_output), arguments_of<d>(call), std::tuple(output_mask),
                                                   tuple_if<d.reduces>(call.keepdim, optional(call.weight())))));
}

template <const Description& d>
void backward_out(const at::Tensor& grad_output, const Call& call, const Gradients& gradients) {
  const auto given = [&]<size_t... I>(std::index_sequence<I...>) { return std::tuple(optional(&gradients[I])...); };
  call_with(backward_out_handle<d>, std::tuple_cat(std::tie(grad_output), arguments_of<d>(call),
                                                   tuple_if<d.reduces>(call.keepdim, optional(call.weight())),
                                                   given(std::make_index_sequence<d.most>())));
}

} // namespace signature

// "name_backward".
template <const Description& d>
inline constexpr auto kBackwardName = [] {
  constexpr std::string_view kName = d.name, kEnd = "_backward";
  std::array<char, kName.size() + kEnd.size() + 1> name{};
  std::copy(kEnd.begin(), kEnd.end(), std::copy(kName.begin(), kName.end(), name.begin()));
  return name;
}();

template <const Description& d>
inline constexpr Operator kOperator = {d, kBackwardName<d>.data(), signature::forward<d>, signature::backward<d>,
                                       signature::backward_out<d>};

namespace signature {

// Turns the arguments of an operator, in the order of its schema, into a call.
class Reader {
 public:
  explicit Reader(const Operator& op) : call(op), description_(op.description) {}

  void take(const at::Tensor& tensor) { add_input(tensor); }

  void take(const std::optional<at::Tensor>& tensor) {
    if (input_ < description_.most) {
      tensor ? add_input(*tensor) : void(++input_);
    } else if (description_.reduces && !is_behind_weight_) {
      if (tensor) {
        call.tensors.push_back({"weight", *tensor});
      }
      call.has_weight = tensor.has_value();
      is_behind_weight_ = true;
    } else {
      gradients.push_back(tensor.value_or(at::Tensor()));
    }
  }

  void take(double bound) { (std::exchange(has_clamp_min_, true) ? call.clamp_max : call.clamp_min) = bound; }
  void take(std::string_view reduction) { call.reduction = reduction; }
  void take(at::OptionalIntArrayRef dim) { call.dim = dim; }
  void take(bool keepdim) { call.keepdim = keepdim; }
  void take(std::optional<at::ScalarType> dtype) { call.dtype = dtype; }

  template <size_t count>
  void take(const std::array<bool, count>& output_mask) {
    std::copy(output_mask.begin(), output_mask.end(), mask.begin());
  }

  Call call;
  Mask mask{};
  c10::SmallVector<at::Tensor, kMaxInputs> gradients; // the given ones

 private:
  void add_input(const at::Tensor& tensor) {
    call.is_given[input_] = true;
    call.tensors.push_back({description_.inputs[input_++], tensor});
  }

  const Description& description_;
  size_t input_ = 0;
  bool has_clamp_min_ = false;
  bool is_behind_weight_ = false;
};

// The kernel that a layer registers: a function of the operator's own type that calls the layer.
template <class Layer, const Description& d, class Function>
struct Kernel;

template <class Layer, const Description& d, class... Types>
struct Kernel<Layer, d, at::Tensor(Types...)> {
  static at::Tensor run(Types... arguments) {
    Reader reader(kOperator<d>);
    (reader.take(arguments), ...);
    return Layer::forward(reader.call);
  }
};

template <class Layer, const Description& d, class... Results, class... Types>
struct Kernel<Layer, d, std::tuple<Results...>(const at::Tensor&, Types...)> {
  static std::tuple<Results...> run(const at::Tensor& grad_output, Types... arguments) {
    Reader reader(kOperator<d>);
    (reader.take(arguments), ...);
    Gradients gradients = Layer::backward(grad_output, reader.call, reader.mask);
    return [&]<size_t... I>(std::index_sequence<I...>) {
      return std::tuple<Results...>(std::move(gradients[I])...);
    }(std::index_sequence_for<Results...>());
  }
};

template <class Layer, const Description& d, class... Types>
struct Kernel<Layer, d, void(const at::Tensor&, Types...)> {
  static void run(const at::Tensor& grad_output, Types... arguments) {
    Reader reader(kOperator<d>);
    (reader.take(arguments), ...);
    Gradients gradients;
    std::move(reader.gradients.begin(), reader.gradients.end(), gradients.begin());
    Layer::backward_out(grad_output, reader.call, gradients);
  }
};

} // namespace signature

// Calls use<description>() for each operator.
template <const Description&... descriptions, class Use>
void for_each_operator(OperatorList<descriptions...>, const Use& use) {
  (use.template operator()<descriptions>(), ...);
}

// Every library that calls the operators calls this once their schemas are defined.
inline void find_handles() {
  for_each_operator(Operators(), []<const Description & d>() {
    const std::string name = c10::str("kl_ext::", d.name);
    const std::string backward = c10::str("kl_ext::", kOperator<d>.backward_name);
    signature::forward_handle<d>.find(name.c_str(), "");
    signature::backward_handle<d>.find(backward.c_str(), "");
    signature::backward_out_handle<d>.find(backward.c_str(), "out");
  });
}

// Registers those of forward(call), backward(grad_output, call, mask) and backward_out(grad_output, call, gradients) that a
// layer has, for every operator.
template <class Layer>
void register_layer(torch::Library& m) {
  for_each_operator(Operators(), [&]<const Description & d>() {
    const std::string name = d.name;
    if constexpr (requires { Layer::forward; }) {
      m.impl(name.c_str(), &signature::Kernel<Layer, d, signature::ForwardType<d>>::run);
    }
    if constexpr (requires { Layer::backward; }) {
      m.impl((name + "_backward").c_str(), &signature::Kernel<Layer, d, signature::BackwardType<d>>::run);
    }
    if constexpr (requires { Layer::backward_out; }) {
      m.impl((name + "_backward.out").c_str(), &signature::Kernel<Layer, d, signature::BackwardOutType<d>>::run);
    }
  });
}

} // namespace kl_ext
