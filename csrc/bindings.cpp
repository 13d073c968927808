// The Python module kl_ext._bindings: the usual call of a public function, handed to the dispatcher as torch's own functions
// are. torch.ops, which can do everything, takes longer to look at the arguments than the operators take for a few thousand
// elements. A call that is not the usual one (a tensor subclass, a __torch_function__ mode, whatever is not of the expected
// type) is declined with None, and the caller turns to torch.ops, errors included.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>

#include <limits>

#include "ops.h"
#include "plan.h"

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
  if (PyFloat_Check(object)) {
    number = PyFloat_AS_DOUBLE(object);
    return true;
  }
  if (!PyLong_CheckExact(object)) {
    return false;
  }
  number = PyLong_AsDouble(object);
  if (PyErr_Occurred() != nullptr) { // an integer beyond all doubles
    PyErr_Clear();
    return false;
  }
  return true;
}

// A bound of the clamp: None is no bound.
struct Low {
  double value = -std::numeric_limits<double>::infinity();
};

struct High {
  double value = std::numeric_limits<double>::infinity();
};

bool read(PyObject* object, Low& bound) { return object == Py_None || read(object, bound.value); }

bool read(PyObject* object, High& bound) { return object == Py_None || read(object, bound.value); }

bool read(PyObject* object, bool& flag) {
  flag = object == Py_True;
  return PyBool_Check(object);
}

// A parameter of q: a tensor, a number or nothing.
struct OfQ {
  std::optional<at::Tensor> tensor;
  std::optional<double> number;
};

bool read(PyObject* object, OfQ& parameter) {
  return read(object, parameter.tensor) || (parameter.tensor.reset(), read(object, parameter.number.emplace()));
}

bool read(PyObject* object, std::string_view& text) {
  Py_ssize_t size = 0;
  const char* const data = PyUnicode_Check(object) ? PyUnicode_AsUTF8AndSize(object, &size) : nullptr;
  if (data == nullptr) {
    PyErr_Clear();
    return false;
  }
  text = std::string_view(data, size);
  return text.find('\0') == text.npos; // an error message would end there
}

bool read(PyObject* object, int64_t& number) {
  int overflow = 0;
  number = PyLong_CheckExact(object) ? PyLong_AsLongLongAndOverflow(object, &overflow) : 0;
  return PyLong_CheckExact(object) && overflow == 0;
}

// A number, or a tuple or list of them.
bool read(PyObject* object, std::optional<at::DimVector>& dims) {
  if (object == Py_None) {
    return true;
  }
  dims.emplace();
  if (!PyTuple_CheckExact(object) && !PyList_CheckExact(object)) {
    return read(object, dims->emplace_back());
  }
  // Of a list this is a copy, which no other thread can change.
  const auto items = pybind11::reinterpret_steal<pybind11::object>(PySequence_Tuple(object));
  if (!items) {
    PyErr_Clear();
    return false;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items.ptr()); ++i) {
    if (!read(PyTuple_GET_ITEM(items.ptr(), i), dims->emplace_back())) {
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

// torch.set_default_device and `with torch.device(...)` are modes as well. They concern functions that make tensors out of
// nothing, so that they need not see a call of ours.
PyObject* type_of_default_device = nullptr; // null where torch has none

// Whether a __torch_function__ mode is to see the call.
bool is_seen_by_a_mode() {
  using at::impl::PythonTorchFunctionTLS;
  if (!at::impl::torch_function_mode_enabled()) {
    return false;
  }
  for (int64_t i = 0; i < PythonTorchFunctionTLS::stack_len(); ++i) {
    PyObject* const mode = PythonTorchFunctionTLS::get_stack_at(i)->ptr(getPyInterpreter());
    if (reinterpret_cast<PyObject*>(Py_TYPE(mode)) != type_of_default_device) {
      return true;
    }
  }
  return false;
}

// q with 0-dim tensors for numbers, as kl_ext/functional.py makes them where torch.compile traces it: precise as the arithmetic,
// without weight in the promotion, on the device of mu_p.
struct Q {
  Q(const at::Tensor& mu_p, const at::Tensor& log_var_p, const OfQ& mu, const OfQ& log_var,
    std::optional<at::ScalarType>& dtype)
      : mu_q(mu.tensor), log_var_q(log_var.tensor) {
    if (!mu.number && !log_var.number) {
      return;
    }
    c10::SmallVector<kl_ext::Argument, 4> tensors{{"mu_p", mu_p}, {"log_var_p", log_var_p}};
    for (const OfQ* const parameter : {&mu, &log_var}) {
      if (parameter->tensor) {
        tensors.push_back({"q", *parameter->tensor});
      }
    }
    const auto arithmetic = kl_ext::arithmetic_type(tensors, dtype.value_or(at::kFloat));
    const bool all_scalars = std::all_of(tensors.begin(), tensors.end(), [](const auto& x) { return x.tensor.dim() == 0; });
    if (!dtype && all_scalars && !at::autocast::is_autocast_enabled(mu_p.device().type())) {
      dtype = kl_ext::result_type(tensors); // 0-dim tensors beside nothing else all have weight
    }
    const auto options = at::dtype(arithmetic).device(mu_p.device());
    mu_q = mu.number ? at::scalar_tensor(*mu.number, options) : mu_q;
    log_var_q = log_var.number ? at::scalar_tensor(*log_var.number, options) : log_var_q;
  }

  std::optional<at::Tensor> mu_q;
  std::optional<at::Tensor> log_var_q;
};

// call(values...) with the arguments as values of these types, in order.
template <class... Values, class Call>
PyObject* call_with(PyObject* const* arguments, Py_ssize_t count, const Call& call) {
  HANDLE_TH_ERRORS
  std::tuple<Values...> values;
  const bool usual = count == sizeof...(Values) && !is_seen_by_a_mode() && [&]<size_t... I>(std::index_sequence<I...>) {
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
  return call_with<at::Tensor, at::Tensor, Low, High>(arguments, count,
                                                      [](const at::Tensor& mu, const at::Tensor& log_var, Low low, High high) {
                                                        return handle.call(mu, log_var, low.value, high.value, std::nullopt);
                                                      });
}

PyObject* kl_div_pair_loss(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  static const auto handle = find<decltype(kl_ext::ops::kl_div_pair_loss)>("kl_ext::kl_div_pair_loss");
  return call_with<at::Tensor, at::Tensor, at::Tensor, at::Tensor, Low, High>(
      arguments, count,
      [](const at::Tensor& mu_p, const at::Tensor& log_var_p, const at::Tensor& mu_q, const at::Tensor& log_var_q, Low low,
         High high) { return handle.call(mu_p, log_var_p, mu_q, log_var_q, low.value, high.value, std::nullopt); });
}

PyObject* gaussian_kl_div(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  static const auto handle = find<decltype(kl_ext::ops::gaussian_kl_div)>("kl_ext::gaussian_kl_div");
  return call_with<at::Tensor, at::Tensor, OfQ, OfQ, Low, High, std::string_view, std::optional<at::DimVector>, bool,
                   std::optional<at::ScalarType>>(
      arguments, count,
      [](const at::Tensor& mu_p, const at::Tensor& log_var_p, const OfQ& mu_q, const OfQ& log_var_q, Low low, High high,
         std::string_view reduction, const auto& dim, bool keepdim, std::optional<at::ScalarType> dtype) {
        const auto dims = dim ? at::OptionalIntArrayRef(*dim) : std::nullopt;
        const Q q(mu_p, log_var_p, mu_q, log_var_q, dtype);
        return handle.call(mu_p, log_var_p, q.mu_q, q.log_var_q, low.value, high.value, reduction, dims, keepdim, dtype);
      });
}

PyObject* overlap(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  std::optional<at::DimVector> sizes[2], strides[2];
  int64_t offset[2], itemsize[2];
  for (int i = 0; i < 2; ++i) {
    PyObject* const* const of = arguments + 4 * i;
    if (count != 8 || !read(of[0], sizes[i]) || !read(of[1], strides[i]) || !read(of[2], offset[i]) ||
        !read(of[3], itemsize[i])) {
      PyErr_SetString(PyExc_TypeError, "overlap: expected sizes, strides, an offset and bytes an element, twice");
      return nullptr;
    }
  }
  const kl_ext::Placement a{*sizes[0], *strides[0], offset[0], itemsize[0]}, b{*sizes[1], *strides[1], offset[1], itemsize[1]};
  return PyLong_FromLong(static_cast<long>(kl_ext::overlap_of(a, b)));
}

template <auto function>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {method<kl_div_single_loss>("kl_div_single_loss"), method<kl_div_pair_loss>("kl_div_pair_loss"),
                         method<gaussian_kl_div>("gaussian_kl_div"), method<overlap>("overlap"), PyMethodDef{}};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "kl_ext._bindings",
                      "The usual calls of the public functions, and which memory tensors share.",
                      0,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

} // namespace

PyMODINIT_FUNC PyInit__bindings() {
  const auto devices = pybind11::reinterpret_steal<pybind11::object>(PyImport_ImportModule("torch.utils._device"));
  type_of_default_device = devices ? PyObject_GetAttrString(devices.ptr(), "DeviceContext") : nullptr;
  PyErr_Clear();
  PyObject* const created = PyModule_Create(&module);
#ifdef Py_GIL_DISABLED
  PyUnstable_Module_SetGIL(created, Py_MOD_GIL_NOT_USED); // no state but what is set here
#endif
  return created;
}
