# The torch to build against, asked of Python: TORCH_VERSION, TORCH_MINOR_VERSION, TORCH_CUDA_VERSION (empty for a CPU build)
# and the imported targets torch_cpu, torch_python and c10. Not find_package(Torch): with a CUDA torch that wants a whole CUDA
# toolkit.
execute_process(
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/torch_info.py"
  RESULT_VARIABLE status OUTPUT_VARIABLE torch_info ERROR_VARIABLE problem)
if(status)
  message(FATAL_ERROR "${problem}")
endif()
string(JSON TORCH_VERSION GET "${torch_info}" version)
string(JSON TORCH_MINOR_VERSION GET "${torch_info}" minor)
string(JSON TORCH_CUDA_VERSION GET "${torch_info}" cuda)
string(JSON TORCH_LIB GET "${torch_info}" lib)
string(JSON include_0 GET "${torch_info}" include 0)
string(JSON include_1 GET "${torch_info}" include 1)
set(TORCH_INCLUDE "${include_0}" "${include_1}")
message(STATUS "torch ${TORCH_VERSION} in ${TORCH_LIB}")

function(kl_ext_add_torch_library name)
  add_library(${name} SHARED IMPORTED)
  set_target_properties(${name} PROPERTIES
    IMPORTED_LOCATION "${TORCH_LIB}/lib${name}.so"
    INTERFACE_INCLUDE_DIRECTORIES "${TORCH_INCLUDE}")
endfunction()
kl_ext_add_torch_library(c10)
kl_ext_add_torch_library(torch_cpu)
kl_ext_add_torch_library(torch_python)

# Threads are torch's: csrc/cpu/parallel.h.
add_library(kl_ext_openmp INTERFACE)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  find_package(OpenMP REQUIRED COMPONENTS CXX) # without it at::parallel_for is silently serial
  target_link_libraries(kl_ext_openmp INTERFACE OpenMP::OpenMP_CXX)
else()
  find_library(LIBGOMP NAMES libgomp.so.1 HINTS "${TORCH_LIB}" REQUIRED)
  target_link_libraries(kl_ext_openmp INTERFACE "${LIBGOMP}")
endif()
