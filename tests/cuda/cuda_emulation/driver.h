// The list of kernels that the driver runs by name: "forward Divergence" and so on.
#pragma once

#include "cuda/kernels.h"

namespace kl_ext::emulation {

using Launch = void (*)(const cuda::Iteration&, const cuda::Settings&, CUstream_st*);
using LaunchSum = void (*)(const cuda::Summation&, const cuda::Settings&, const cuda::SumResults&, void*, CUstream_st*);

// Defined in driver.cpp, and not inline: what is static in an inline function is one for all libraries of a process.
bool enter(const char* name, Launch launch);
bool enter(const char* name, LaunchSum launch);

} // namespace kl_ext::emulation
