// As much of CUDA's kernel language as csrc/cuda uses, for a C++ compiler: included before each of its files (-include), it
// makes them run on the host. The threads of a kernel that lets them exchange numbers are fibers, each of which runs until it
// has to wait for others; those of any other kernel run one after the other. What a GPU would let pass or hang on is a Fault.
#pragma once

#include "block.h"

#define __global__
#define __launch_bounds__(...)

namespace kl_ext::emulation {

// The grid of each launch, and how many blocks of each to run, from its end.
inline std::vector<std::uint32_t> launched;
inline std::uint32_t last_blocks = ~0u;

// What takes the place of 2^31: see csrc/cuda/layout.h.
inline std::int64_t indices = std::int64_t{1} << 31;

template <auto kernel, class... Arguments>
void launch(bool exchanging, std::uint32_t blocks, std::uint32_t threads, const Arguments&... arguments) {
  kernel_name = name_of<kernel>();
  launched.push_back(blocks);
  const auto body = [&] { kernel(arguments...); };
  std::vector<std::uint32_t> turns(std::min(blocks, last_blocks));
  arrange(turns, blocks - static_cast<std::uint32_t>(turns.size()));
  if (exchanging) {
    Block block(threads, body);
    for (const std::uint32_t i : turns) {
      blockIdx.x = i;
      block.run();
    }
    return;
  }
  std::vector<std::uint32_t> threads_turns(threads);
  for (const std::uint32_t i : turns) {
    blockIdx.x = i;
    arrange(threads_turns);
    for (const std::uint32_t thread : threads_turns) {
      threadIdx.x = thread;
      body();
    }
  }
}

} // namespace kl_ext::emulation

inline void __syncthreads(const kl_ext::emulation::Site& site = kl_ext::emulation::Site::current()) {
  kl_ext::emulation::Block::of(site).barrier(site);
}

template <class T>
T __shfl_xor_sync(std::uint32_t mask, T value, std::uint32_t lane_mask,
                  const kl_ext::emulation::Site& site = kl_ext::emulation::Site::current()) {
  if (mask != 0xffffffff || lane_mask >= kl_ext::emulation::kWarp) {
    kl_ext::emulation::fail(site, "shuffles part of a warp");
  }
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = kl_ext::emulation::Block::of(site).shuffle(bits, lane_mask, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

#define KL_EXT_LAUNCH(kernel, blocks, threads, stream, ...) \
  (static_cast<void>(stream), kl_ext::emulation::launch<kernel>(false, blocks, threads, __VA_ARGS__))
#define KL_EXT_LAUNCH_EXCHANGING(kernel, blocks, threads, stream, ...) \
  (static_cast<void>(stream), kl_ext::emulation::launch<kernel>(true, blocks, threads, __VA_ARGS__))
#define KL_EXT_UNROLL
#define KL_EXT_DEVICE inline
#define KL_EXT_INLINE inline
#define KL_EXT_SHARED(type, name, size)                           \
  const auto site_of_##name = kl_ext::emulation::Site::current(); \
  const auto name = kl_ext::emulation::Block::of(site_of_##name).template shared<type>(#name, size, site_of_##name)
#define KL_EXT_INDICES kl_ext::emulation::indices
