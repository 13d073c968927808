# Whether to build the CUDA kernels, with which nvcc and for which GPUs: sets KL_EXT_WITH_CUDA, KL_EXT_CUDA_ARCHITECTURES,
# KL_EXT_GENERATE_CODE, KL_EXT_CUDA_COMPILER_VERSION, KL_EXT_CUDA_RPATH and defines the imported target c10_cuda.
#
# With a CUDA build of torch and nvcc they are built for the GPUs that are visible, or where none is, as while a container is made,
# for all architectures; TORCH_CUDA_ARCH_LIST names others. Without nvcc they are left out, with a warning. KL_EXT_CUDA changes
# that: 0 leaves them out; 1 makes it an error where they cannot be built; all does too, and is for all architectures; auto leaves
# them out where no GPU is visible.
set(KL_EXT_WITH_CUDA OFF)
if(NOT DEFINED KL_EXT_CUDA)
  set(KL_EXT_CUDA "$ENV{KL_EXT_CUDA}")
endif()
if(NOT KL_EXT_CUDA MATCHES "^(|0|1|all|auto)$")
  message(FATAL_ERROR "kl_ext: expected KL_EXT_CUDA to be 0, 1, all or auto, got '${KL_EXT_CUDA}'.")
endif()
if(KL_EXT_CUDA STREQUAL "0")
  message(STATUS "No CUDA kernels: KL_EXT_CUDA=0.")
  return()
endif()
if(NOT TORCH_CUDA_VERSION)
  if(KL_EXT_CUDA MATCHES "^(1|all)$")
    message(FATAL_ERROR
      "kl_ext: KL_EXT_CUDA=${KL_EXT_CUDA} asks for CUDA kernels, and torch ${TORCH_VERSION} is not a CUDA build.\n"
      "Install a CUDA build of torch, or unset KL_EXT_CUDA.")
  endif()
  message(STATUS "No CUDA kernels: torch ${TORCH_VERSION} is not a CUDA build.")
  return()
endif()

include("${CMAKE_CURRENT_LIST_DIR}/cuda_architectures.cmake")
kl_ext_visible_gpus(visible)
if(KL_EXT_CUDA STREQUAL "auto" AND NOT visible AND "$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
  message(STATUS "No CUDA kernels: no GPU is visible, and KL_EXT_CUDA=auto.")
  return()
endif()

if(DEFINED ENV{CUDACXX})
  set(nvcc "$ENV{CUDACXX}")
else()
  find_program(nvcc nvcc HINTS "$ENV{CUDA_HOME}/bin" "$ENV{CUDA_PATH}/bin" PATHS /usr/local/cuda/bin NO_CACHE)
endif()
execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE nvcc_says ERROR_QUIET RESULT_VARIABLE status)
string(REGEX MATCH "release ([0-9]+)\\.([0-9]+)" release "${nvcc_says}")
set(nvcc_major "${CMAKE_MATCH_1}")
set(nvcc_version "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
string(REGEX MATCH "^[0-9]+" torch_cuda_major "${TORCH_CUDA_VERSION}")
if(NOT release)
  if(KL_EXT_CUDA MATCHES "^(1|all)$")
    set(severity FATAL_ERROR)
  else()
    set(severity WARNING)
  endif()
  message(${severity}
    "kl_ext: torch ${TORCH_VERSION} is a CUDA build, and no nvcc was found to build the CUDA kernels with (looked at CUDACXX, "
    "CUDA_HOME, PATH and /usr/local/cuda): CUDA tensors will be refused.\n"
    "Install the CUDA ${torch_cuda_major} toolkit's nvcc or set CUDACXX to it; KL_EXT_CUDA=0 means a CPU-only build, and "
    "KL_EXT_CUDA=1 makes this an error.")
  return()
endif()
if(NOT nvcc_major STREQUAL torch_cuda_major)
  message(FATAL_ERROR
    "kl_ext: torch ${TORCH_VERSION} was built with CUDA ${TORCH_CUDA_VERSION}, and ${nvcc} is CUDA ${nvcc_version}: the major "
    "versions must agree.\n"
    "Set CUDACXX to a CUDA ${torch_cuda_major} nvcc; or install a torch built with CUDA ${nvcc_major}; or set KL_EXT_CUDA=0 "
    "to mean a CPU-only build.")
endif()

if(NOT "$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
  kl_ext_cuda_architectures("$ENV{TORCH_CUDA_ARCH_LIST}" CMAKE_CUDA_ARCHITECTURES)
elseif(visible AND NOT KL_EXT_CUDA STREQUAL "all" AND NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  kl_ext_cuda_architectures("${visible}" CMAKE_CUDA_ARCHITECTURES)
elseif(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND nvcc_version VERSION_LESS 12.8)
  set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 90) # nvcc knows no later ones
elseif(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 90-real 100-real 120)
endif()

set(KL_EXT_WITH_CUDA ON)
set(CMAKE_CUDA_COMPILER "${nvcc}")
if(NOT DEFINED ENV{CUDAHOSTCXX})
  set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
endif()
set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION) # CMake 3.25 does not know that nvcc has C++20
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()

set(KL_EXT_CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
kl_ext_generate_code("${CMAKE_CUDA_ARCHITECTURES}" KL_EXT_GENERATE_CODE)
set(CMAKE_CUDA_ARCHITECTURES OFF)
set(KL_EXT_CUDA_COMPILER_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")
message(STATUS "CUDA kernels for ${KL_EXT_CUDA_ARCHITECTURES} with ${nvcc} ${KL_EXT_CUDA_COMPILER_VERSION}")
list(LENGTH KL_EXT_CUDA_ARCHITECTURES count)
if(count GREATER 3)
  message(STATUS "This takes about six minutes on two cores. TORCH_CUDA_ARCH_LIST=8.6, say, builds for one GPU only.")
endif()

# Where the nvidia packages that torch depends on put libcudart.so.
if(torch_cuda_major VERSION_LESS 13)
  set(KL_EXT_CUDA_RPATH ":$ORIGIN/../../nvidia/cuda_runtime/lib")
else()
  set(KL_EXT_CUDA_RPATH ":$ORIGIN/../../nvidia/cu${torch_cuda_major}/lib")
endif()
kl_ext_add_torch_library(c10_cuda)
target_include_directories(c10_cuda SYSTEM INTERFACE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})

# Writes the source files of the kernels: of every formula in the list of csrc/math/formulas.h, alone and with weights, and of
# the weights themselves. Sets a variable to their names. A file takes six seconds before its first kernel, so there are not more
# of them than a machine's cores can share.
function(kl_ext_cuda_instances result)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS csrc/math/formulas.h)
  file(READ csrc/math/formulas.h text)
  string(REGEX MATCH "using Formulas = FormulaList<([^>]*)>" list "${text}")
  string(REGEX MATCHALL "[A-Za-z0-9_]+" formulas "${CMAKE_MATCH_1}")
  set(files "")
  foreach(formula IN LISTS formulas)
    kl_ext_cuda_instance(${formula} forward backward)
    kl_ext_cuda_instance(${formula} forward_sum)
    kl_ext_cuda_instance(${formula} backward_sum)
    kl_ext_cuda_instance("Weighted<math::${formula}>" forward backward forward_sum backward_sum)
  endforeach()
  kl_ext_cuda_instance(Weight forward_sum)
  set(${result} ${files} PARENT_SCOPE)
endfunction()

# One file, with these functions of csrc/cuda/kernels.h for a formula.
function(kl_ext_cuda_instance formula)
  set(instances "")
  foreach(function IN LISTS ARGN)
    string(APPEND instances "template decltype(${function}<math::${formula}>) ${function}<math::${formula}>;\n")
  endforeach()
  string(MAKE_C_IDENTIFIER "${formula}_${ARGN}" name)
  set(file "${CMAKE_CURRENT_BINARY_DIR}/cuda/${name}.cu")
  configure_file(csrc/cuda/instance.cu.in "${file}" @ONLY)
  set(files ${files} "${file}" PARENT_SCOPE)
endfunction()
