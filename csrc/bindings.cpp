// The Python module kl_ext._bindings: the usual call of a public function, handed to the dispatcher as torch's own functions
// are. torch.ops, which can do everything, takes longer to look at the arguments than the operators take for a few thousand
// elements. A call that is not the usual one (a tensor subclass, a __torch_function__ mode, whatever is not of the expected
// type) is declined with None, and the caller turns to torch.ops, errors included.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "ops.h"

namespace {

template <class Function>
c10::TypedOperatorHandle<Function> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

// Each of these returns whether it could read the argument.

bool read(PyObject* object, at::Tensor& tensor) {
  if (!THPVariable_CheckExact(object)) {
    return false;
  }
  tensor = THPVariable_Unpack(object);
  return true;
}

bool read(PyObject* object, std::optional<at::Tensor>& tensor) { return object == Py_None || read(object, tensor.emplace()); }

bool read(PyObject* object, double& number) {
  if (!PyFloat_CheckExact(object)) {
    return false;
  }
  number = PyFloat_AS_DOUBLE(object);
  return true;
}

bool read(PyObject* object, std::string_view& text) {
  Py_ssize_t size = 0;
  const char* const data = PyUnicode_Check(object) ? PyUnicode_AsUTF8AndSize(object, &size) : nullptr;
  if (data == nullptr) {
    PyErr_Clear();
    return false;
  }
  text = std::string_view(data, size);
  return true;
}

bool read(PyObject* object, int64_t& number) {
  int overflow = 0;
  number = PyLong_CheckExact(object) ? PyLong_AsLongLongAndOverflow(object, &overflow) : 0;
  return PyLong_CheckExact(object) && overflow == 0;
}

// A number or a tuple of them.
bool read(PyObject* object, std::optional<at::DimVector>& dims) {
  if (object == Py_None) {
    return true;
  }
  dims.emplace();
  if (!PyTuple_CheckExact(object)) {
    return read(object, dims->emplace_back());
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(object); ++i) {
    if (!read(PyTuple_GET_ITEM(object, i), dims->emplace_back())) {
      return false;
    }
  }
  return true;
}

bool read(PyObject* object, std::optional<at::ScalarType>& dtype) {
  if (object != Py_None) {
    if (!THPDtype_Check(object)) {
      return false;
    }
    dtype = reinterpret_cast<THPDtype*>(object)->scalar_type;
  }
  return true;
}

// call(values...) with the arguments as values of these types, in order.
template <class... Values, class Call>
PyObject* call_with(PyObject* const* arguments, Py_ssize_t count, const Call& call) {
  HANDLE_TH_ERRORS
  std::tuple<Values...> values;
  const bool usual =
      count == sizeof...(Values) && !at::impl::torch_function_mode_enabled() && [&]<size_t... I>(std::index_sequence<I...>) {
        return (read(arguments[I], std::get<I>(values)) && ...);
      }(std::index_sequence_for<Values...>());
  if (!usual) {
    Py_RETURN_NONE;
  }
  at::Tensor result = [&] {
    const pybind11::gil_scoped_release no_gil;
    return std::apply(call, values);
  }();
  return THPVariable_Wrap(std::move(result));
  END_HANDLE_TH_ERRORS
}

PyObject* kl_div_single_loss(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  static const auto handle = find<decltype(kl_ext::ops::kl_div_single_loss)>("kl_ext::kl_div_single_loss");
  return call_with<at::Tensor, at::Tensor, double, double>(
      arguments, count, [](const auto&... values) { return handle.call(values..., std::nullopt); });
}

PyObject* kl_div_pair_loss(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  static const auto handle = find<decltype(kl_ext::ops::kl_div_pair_loss)>("kl_ext::kl_div_pair_loss");
  return call_with<at::Tensor, at::Tensor, at::Tensor, at::Tensor, double, double>(
      arguments, count, [](const auto&... values) { return handle.call(values..., std::nullopt); });
}

PyObject* gaussian_kl_div(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  static const auto handle = find<decltype(kl_ext::ops::gaussian_kl_div)>("kl_ext::gaussian_kl_div");
  return call_with<at::Tensor, at::Tensor, std::optional<at::Tensor>, std::optional<at::Tensor>, double, double,
                   std::string_view, std::optional<at::DimVector>, std::optional<at::ScalarType>>(
      arguments, count,
      [](const auto& mu_p, const auto& log_var_p, const auto& mu_q, const auto& log_var_q, double clamp_min, double clamp_max,
         std::string_view reduction, const auto& dim, const auto& dtype) {
        const auto dims = dim ? at::OptionalIntArrayRef(*dim) : std::nullopt;
        return handle.call(mu_p, log_var_p, mu_q, log_var_q, clamp_min, clamp_max, reduction, dims, dtype);
      });
}

template <auto function>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {method<kl_div_single_loss>("kl_div_single_loss"), method<kl_div_pair_loss>("kl_div_pair_loss"),
                         method<gaussian_kl_div>("gaussian_kl_div"), PyMethodDef{}};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "kl_ext._bindings",
                      "The usual calls of the public functions.",
                      0,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

} // namespace

PyMODINIT_FUNC PyInit__bindings() { return PyModule_Create(&module); }
