// The Python module kl_ext._C: facts about this build, and nothing else. It links neither torch nor libkl_ext.so, so that it
// can be imported, and a mismatch explained, before either is loaded.
#include <pybind11/pybind11.h>

#include "build_facts.h"

namespace py = pybind11;

namespace {

// CMake's lists are separated by semicolons.
py::tuple tuple_of(const char* list) { return *list == '\0' ? py::tuple() : py::tuple(py::str(list).attr("split")(";")); }

py::object text_or_none(const char* text) { return *text == '\0' ? py::object(py::none()) : py::str(text); }

} // namespace

// Nothing here changes after import, so it needs no GIL.
PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  module.doc() = "What this build of kl_ext is.";
  module.attr("version") = KL_EXT_VERSION;
  module.attr("torch_version") = KL_EXT_TORCH_VERSION;
  module.attr("torch_cuda_version") = text_or_none(KL_EXT_TORCH_CUDA_VERSION);
  module.attr("cuda_compiler_version") = text_or_none(KL_EXT_CUDA_COMPILER_VERSION);
  module.attr("cuda_architectures") = tuple_of(KL_EXT_CUDA_ARCHITECTURES);
  module.attr("cpu_capabilities") = tuple_of(KL_EXT_CPU_CAPABILITIES);
  module.attr("compiler") = KL_EXT_COMPILER;
  module.attr("cxx_flags") = KL_EXT_CXX_FLAGS;
  module.attr("build_type") = KL_EXT_BUILD_TYPE;
}
