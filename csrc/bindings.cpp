// The Python module kl_ext._bindings: the usual call of a public function, handed to the dispatcher as torch's own functions
// are. torch.ops, which can do everything, takes longer to look at the arguments than the operators take for a few thousand
// elements. A call that is not the usual one (a tensor subclass, a __torch_function__ mode, whatever is not of the expected
// type) is declined with None, and the caller turns to torch.ops, errors included.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>

#include <limits>

#include "plan.h"
#include "signature.h"

namespace {

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

// A bound of the clamp. None leaves it at its default, which is no bound.
bool read_bound(PyObject* object, double& bound) { return object == Py_None || read(object, bound); }

bool read(PyObject* object, bool& flag) {
  flag = object == Py_True;
  return PyBool_Check(object);
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
  // For a list this is a copy, which no other thread can change.
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

// torch.set_default_device and `with torch.device(...)` are modes too. They only matter to functions that make tensors out of
// nothing, so they need not see our calls.
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

// The arguments of a call, as values. They come in the order of the operator's schema.
struct Values {
  std::array<std::optional<at::Tensor>, kl_ext::kMaxInputs> inputs;
  std::array<std::optional<double>, kl_ext::kMaxInputs> numbers; // given in place of optional inputs
  std::optional<at::Tensor> weight;
  double clamp_min = -std::numeric_limits<double>::infinity();
  double clamp_max = std::numeric_limits<double>::infinity();
  std::string_view reduction = "none";
  std::optional<at::DimVector> dim;
  bool keepdim = false;
  std::optional<at::ScalarType> dtype;

  bool read_all(const kl_ext::Description& d, PyObject* const* arguments, Py_ssize_t count) {
    const size_t expected = d.most + (d.clamps ? 2 : 0) + (d.reduces ? 5 : 0);
    if (count != static_cast<Py_ssize_t>(expected)) {
      return false;
    }
    for (size_t i = 0; i < d.most; ++i) {
      PyObject* const object = *arguments++;
      const bool may_be_other = i >= d.least;
      if (!(may_be_other && object == Py_None) && !read(object, inputs[i].emplace())) {
        inputs[i].reset();
        if (!may_be_other || !read(object, numbers[i].emplace())) {
          return false;
        }
      } else if (object == Py_None) {
        inputs[i].reset();
      }
    }
    if (d.reduces && !read(*arguments++, weight)) {
      return false;
    }
    if (d.clamps && !(read_bound(arguments[0], clamp_min) && read_bound(arguments[1], clamp_max))) {
      return false;
    }
    arguments += d.clamps ? 2 : 0;
    return !d.reduces || (read(arguments[0], reduction) && read(arguments[1], dim) && read(arguments[2], keepdim) &&
                          read(arguments[3], dtype));
  }

  // Replaces numbers by 0-dim tensors, as kl_ext/functional.py does when torch.compile traces it: in the arithmetic dtype,
  // without effect on type promotion, on the device of the first input.
  void replace_numbers(const kl_ext::Description& d) {
    if (std::none_of(numbers.begin(), numbers.end(), [](const auto& number) { return number.has_value(); })) {
      return;
    }
    c10::SmallVector<kl_ext::NamedTensor, kl_ext::kMaxInputs + 1> tensors;
    for (size_t i = 0; i < d.most; ++i) {
      if (inputs[i]) {
        tensors.push_back({d.inputs[i], *inputs[i]});
      }
    }
    if (weight) {
      tensors.push_back({"weight", *weight});
    }
    const at::Device device = inputs[0]->device();
    const auto arithmetic = kl_ext::arithmetic_type(tensors, dtype.value_or(at::kFloat));
    const bool all_scalars = std::all_of(tensors.begin(), tensors.end(), [](const auto& x) { return x.tensor.dim() == 0; });
    if (!dtype && all_scalars && !at::autocast::is_autocast_enabled(device.type())) {
      dtype = kl_ext::result_type(tensors); // all are 0-dim, so all take part in promotion
    }
    for (size_t i = 0; i < d.most; ++i) {
      if (numbers[i]) {
        inputs[i] = at::scalar_tensor(*numbers[i], at::dtype(arithmetic).device(device));
      }
    }
  }

  // The call refers to this object and must not outlive it.
  kl_ext::Call to_call(const kl_ext::Operator& op) const {
    kl_ext::Call call(op);
    const auto& d = op.description;
    for (size_t i = 0; i < d.most; ++i) {
      call.is_given[i] = inputs[i].has_value();
      if (inputs[i]) {
        call.tensors.push_back({d.inputs[i], *inputs[i]});
      }
    }
    if (weight) {
      call.tensors.push_back({"weight", *weight});
    }
    call.has_weight = weight.has_value();
    call.clamp_min = clamp_min;
    call.clamp_max = clamp_max;
    call.reduction = reduction;
    call.dim = dim ? at::OptionalIntArrayRef(*dim) : std::nullopt;
    call.keepdim = keepdim;
    call.dtype = dtype;
    return call;
  }
};

template <const kl_ext::Description& d>
PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Values values;
  if (is_seen_by_a_mode() || !values.read_all(d, arguments, count)) {
    Py_RETURN_NONE;
  }
  at::Tensor result = [&] {
    const pybind11::gil_scoped_release no_gil;
    values.replace_numbers(d);
    return kl_ext::kOperator<d>.forward(values.to_call(kl_ext::kOperator<d>));
  }();
  return THPVariable_Wrap(std::move(result));
  END_HANDLE_TH_ERRORS
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

template <class Function>
PyMethodDef method(const char* name, Function* function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

template <const kl_ext::Description&... d>
std::array<PyMethodDef, sizeof...(d) + 2> methods_of(kl_ext::OperatorList<d...>) {
  return {method(d.name, call<d>)..., method("overlap", overlap), PyMethodDef{}};
}

auto methods = methods_of(kl_ext::Operators());

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "kl_ext._bindings",
                      "The usual calls of the public functions, and which memory tensors share.",
                      0,
                      methods.data(),
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

} // namespace

PyMODINIT_FUNC PyInit__bindings() {
  kl_ext::find_handles();
  const auto devices = pybind11::reinterpret_steal<pybind11::object>(PyImport_ImportModule("torch.utils._device"));
  type_of_default_device = devices ? PyObject_GetAttrString(devices.ptr(), "DeviceContext") : nullptr;
  PyErr_Clear();
  PyObject* const created = PyModule_Create(&module);
#ifdef Py_GIL_DISABLED
  PyUnstable_Module_SetGIL(created, Py_MOD_GIL_NOT_USED); // the only state is what is set here
#endif
  return created;
}
