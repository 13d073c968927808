#include "block.h"

#include <ATen/Version.h>

#include <string>

#include "../math/exponential.h"

namespace kl_ext::cpu {

namespace {

// torch chooses by the processor and by the environment variable ATEN_CPU_CAPABILITY.
const Kernels& choose() {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  return capability.starts_with("AVX512") ? AVX512::kernels : capability == "AVX2" ? AVX2::kernels : DEFAULT::kernels;
#else
  return DEFAULT::kernels;
#endif
}

// Chosen while the library is loaded: later, another thread may be changing the environment.
const Kernels& chosen = choose();

} // namespace

const Kernels& kernels() { return chosen; }

bool is_wide(const Settings& settings, Arithmetic arithmetic) {
  const double bound = arithmetic == kDouble ? math::kNarrowBound<double> : math::kNarrowBound<float>;
  return !(settings.low >= -bound && settings.high <= bound);
}

} // namespace kl_ext::cpu
