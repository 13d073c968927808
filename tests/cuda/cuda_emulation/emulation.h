// As much of CUDA's kernel language as csrc/cuda uses, for a C++ compiler: included before each of its files (-include), it
// makes them run on the host. The threads of a kernel that lets them exchange numbers are fibers, each of which runs until it
// has to wait for others; those of any other kernel run one after the other. What a GPU would let pass or hang on is a Fault.
#pragma once

#include <algorithm>
#include <vector>

#include "shared.h"

#define __global__
#define __launch_bounds__(...)

namespace kl_ext::emulation {

constexpr std::uint32_t kWarp = 32;

// The grid of each launch, and how many blocks of each to run, from its end.
inline std::vector<std::uint32_t> launched;
inline std::uint32_t last_blocks = ~0u;

// What takes the place of 2^31: see csrc/cuda/layout.h. Then numbers of csrc/cuda/tuning.h.
inline std::int64_t indices = std::int64_t{1} << 31;
inline std::int64_t few_threads = std::int64_t{1} << 17;
inline std::int64_t preparing_threads = std::int64_t{1} << 16;

// In which blocks and threads take turns: forward, reverse, random from this seed.
void set_order(int order, std::uint32_t seed);

// body: what a thread runs.
void run_grid(const std::string& kernel, bool exchanging, std::uint32_t blocks, std::uint32_t threads,
              void (*body)(const void* context), const void* context);
void barrier(const Site& site);
std::uint64_t shuffle(std::uint64_t bits, std::uint32_t lane_mask, const Site& site);
SharedArray& shared_array(const char* name, std::size_t size, const Site& site);

template <auto kernel, class... Arguments>
void launch(bool exchanging, std::uint32_t blocks, std::uint32_t threads, const Arguments&... arguments) {
  const auto run = [&] { kernel(arguments...); };
  using Run = decltype(run);
  run_grid(name_of<kernel>(), exchanging, blocks, threads, [](const void* context) { (*static_cast<Run*>(context))(); }, &run);
}

// How many threads have waited for the launch before theirs.
inline std::uint64_t awaits = 0;

// A launch that may overlap with the one before, for which all its threads wait. Here they run one after the other all the same.
template <auto kernel, class... Arguments>
void launch_after(const Site& site, std::uint32_t blocks, std::uint32_t threads, const Arguments&... arguments) {
  awaits = 0;
  launch<kernel>(true, blocks, threads, arguments...);
  if (awaits != std::uint64_t{std::min(blocks, last_blocks)} * threads) {
    fail(site, "does not wait for the launch before it");
  }
}

} // namespace kl_ext::emulation

inline void __syncthreads(const kl_ext::emulation::Site& site = kl_ext::emulation::Site::current()) {
  kl_ext::emulation::barrier(site);
}

template <class T>
T __shfl_xor_sync(std::uint32_t mask, T value, std::uint32_t lane_mask,
                  const kl_ext::emulation::Site& site = kl_ext::emulation::Site::current()) {
  if (mask != 0xffffffff || lane_mask >= kl_ext::emulation::kWarp) {
    kl_ext::emulation::fail(site, "shuffles part of a warp");
  }
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = kl_ext::emulation::shuffle(bits, lane_mask, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

#define KL_EXT_LAUNCH(kernel, blocks, threads, stream, ...) \
  (static_cast<void>(stream), kl_ext::emulation::launch<kernel>(false, blocks, threads, __VA_ARGS__))
#define KL_EXT_LAUNCH_EXCHANGING(kernel, blocks, threads, stream, ...) \
  (static_cast<void>(stream), kl_ext::emulation::launch<kernel>(true, blocks, threads, __VA_ARGS__))
#define KL_EXT_LAUNCH_AFTER(kernel, blocks, threads, stream, ...) \
  (static_cast<void>(stream),                                     \
   kl_ext::emulation::launch_after<kernel>(kl_ext::emulation::Site::current(), blocks, threads, __VA_ARGS__))
#define KL_EXT_AWAIT_LAUNCH() static_cast<void>(++kl_ext::emulation::awaits)
#define KL_EXT_LET_NEXT_BEGIN() static_cast<void>(0)
#define KL_EXT_KEEP(integer) static_cast<void>(0)
#define KL_EXT_UNROLL
#define KL_EXT_DEVICE inline
#define KL_EXT_INLINE inline
#define KL_EXT_SHARED(type, name, size)              \
  const kl_ext::emulation::SharedPointer<type> name( \
      kl_ext::emulation::shared_array(#name, size, kl_ext::emulation::Site::current()))
#define KL_EXT_INDICES kl_ext::emulation::indices
#define KL_EXT_FEW_THREADS kl_ext::emulation::few_threads
#define KL_EXT_PREPARING_THREADS kl_ext::emulation::preparing_threads
