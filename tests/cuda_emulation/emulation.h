// As much of CUDA's kernel language as csrc/cuda uses, for a C++ compiler: included before each of its files (-include), it
// makes them run on the host. Threads run one after the other, which is enough for kernels that do not speak to each other.
#pragma once

#include <cstdint>
#include <vector>

#define __global__
#define __launch_bounds__(...)

struct Index {
  std::uint32_t x;
};
inline Index blockIdx;
inline Index threadIdx;

namespace kl_ext::emulation {

// The grid of each launch, and how many blocks of each to run, from its end.
inline std::vector<std::uint32_t> launched;
inline std::uint32_t last_blocks;

template <class Kernel, class... Arguments>
void launch(Kernel kernel, std::uint32_t blocks, std::uint32_t threads, const Arguments&... arguments) {
  launched.push_back(blocks);
  for (std::uint32_t block = blocks > last_blocks ? blocks - last_blocks : 0; block < blocks; ++block) {
    for (std::uint32_t thread = 0; thread < threads; ++thread) {
      blockIdx.x = block;
      threadIdx.x = thread;
      kernel(arguments...);
    }
  }
}

} // namespace kl_ext::emulation

#define KL_EXT_LAUNCH(kernel, blocks, threads, stream, ...) \
  (static_cast<void>(stream), kl_ext::emulation::launch(kernel, blocks, threads, __VA_ARGS__))
