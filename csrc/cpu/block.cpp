#include "block.h"

#include <ATen/Version.h>

#include <string>

#include "../math/exponential.h"

namespace kl_ext::cpu {

const Kernels& kernels() {
#if defined(__x86_64__)
  static const Kernels* const chosen = [] {
    const std::string capability = at::get_cpu_capability();
    return capability.starts_with("AVX512") ? &AVX512::kernels : capability == "AVX2" ? &AVX2::kernels : &DEFAULT::kernels;
  }();
  return *chosen;
#else
  return DEFAULT::kernels;
#endif
}

bool is_wide(Bounds bounds, Arithmetic arithmetic) {
  const double bound = arithmetic == kDouble ? math::kNarrowBound<double> : math::kNarrowBound<float>;
  return !(bounds.low >= -bound && bounds.high <= bound);
}

} // namespace kl_ext::cpu
