// The list of kernels that the driver runs by name: "function formula", as csrc/cuda/instances.txt has them.
#pragma once

#include <map>
#include <string>

#include "cuda/kernels.h"

namespace kl_ext::emulation {

using Launch = void (*)(const cuda::Iteration&, const cuda::Settings&, CUstream_st*);
using LaunchSum = void (*)(const cuda::Summation&, const cuda::Settings&, const cuda::SumResults&, void*, CUstream_st*);

inline std::map<std::string, Launch>& elementwise() {
  static std::map<std::string, Launch> all;
  return all;
}

inline std::map<std::string, LaunchSum>& sums() {
  static std::map<std::string, LaunchSum> all;
  return all;
}

inline bool enter(const char* name, Launch launch) { return elementwise().emplace(name, launch).second; }

inline bool enter(const char* name, LaunchSum launch) { return sums().emplace(name, launch).second; }

} // namespace kl_ext::emulation
