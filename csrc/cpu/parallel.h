#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#include "block.h"

#ifndef _OPENMP
extern "C" void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
extern "C" int omp_get_num_threads();
extern "C" int omp_get_thread_num();
#endif

namespace kl_ext::cpu {

#ifdef _OPENMP
using at::parallel_for;
#else
/// at::parallel_for for Clang, which compiles `#pragma omp parallel` to calls of its own runtime, libomp. The threads of that stand
/// beside torch's, and torch.set_num_threads does not change their number. This calls torch's runtime, as the code of GCC does.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  at::internal::lazy_init_num_threads();
  grain = std::max<int64_t>(grain, 1);
  if (end - begin <= grain || at::in_parallel_region() || at::get_num_threads() == 1) {
    at::parallel_for(begin, end, grain, f); // compiled without OpenMP, in this thread
    return;
  }
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr error;
  auto part = [&] {
    const int64_t parts = std::min<int64_t>(omp_get_num_threads(), ceil_divide(end - begin, grain));
    const int64_t size = ceil_divide(end - begin, parts);
    const int64_t first = begin + omp_get_thread_num() * size;
    if (first >= end) {
      return;
    }
    try {
      const at::internal::ThreadIdGuard id(omp_get_thread_num());
      const c10::ParallelGuard guard(true);
      f(first, std::min(first + size, end));
    } catch (...) {
      if (!failed.test_and_set()) {
        error = std::current_exception();
      }
    }
  };
  GOMP_parallel([](void* data) { (*static_cast<decltype(part)*>(data))(); }, &part, 0, 0);
  if (error) {
    std::rethrow_exception(error);
  }
}
#endif

} // namespace kl_ext::cpu
