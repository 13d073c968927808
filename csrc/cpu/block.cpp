#include "block.h"

#include <ATen/Version.h>
#include <sys/mman.h>

#include <cstdlib>
#include <string>

#include "../math/exponential.h"

namespace kl_ext::cpu {

const Kernels& kernels() {
#if defined(__x86_64__)
  static const Kernels& chosen = [&]() -> const Kernels& {
    const std::string capability = at::get_cpu_capability();
    return capability.starts_with("AVX512") ? AVX512::kernels : capability == "AVX2" ? AVX2::kernels : DEFAULT::kernels;
  }();
  return chosen;
#else
  return DEFAULT::kernels;
#endif
}

bool is_wide(Bounds bounds, Arithmetic arithmetic) {
  const double bound = arithmetic == kDouble ? math::kNarrowBound<double> : math::kNarrowBound<float>;
  return !(bounds.low >= -bound && bounds.high <= bound);
}

void prefer_huge_pages(const at::Tensor& fresh) {
  constexpr size_t kPage = size_t{2} << 20;
  static const bool enabled = [] {
    const char* const value = std::getenv("KL_EXT_HUGE_PAGES");
    return value == nullptr || std::string(value) != "0";
  }();
  const c10::Storage& memory = fresh.storage();
  if (enabled && memory.nbytes() >= 2 * kPage) {
    const auto start = reinterpret_cast<std::uintptr_t>(memory.data());
    const auto first = (start + kPage - 1) / kPage * kPage;
    const auto last = (start + memory.nbytes()) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE); // best effort: an error changes nothing
  }
}

} // namespace kl_ext::cpu
