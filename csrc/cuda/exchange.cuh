// Lanes folded among threads, in the order of math/summation.h: lane l takes lane l + h, for h halved from half the lanes to 1.
// Every thread of a warp, or of the block, comes here together.
#pragma once

#include "access.cuh"
#include "launch.cuh"

namespace kl_ext::cuda {

template <class T, int kItems>
KL_EXT_INLINE void fold_items(T (&lanes)[kItems]) {
  for (int half = kItems / 2; half > 0; half /= 2) {
    for (int item = 0; item < half; ++item) {
      lanes[item] += lanes[item + half];
    }
  }
}

// Threads `width` beside each other hold consecutive lanes each (neighbours), or lane = thread + width * item. The sum is left
// with all of them.
template <bool neighbours, class T, int kItems>
KL_EXT_DEVICE T fold_among_neighbours(T (&lanes)[kItems], std::uint32_t width) {
  if constexpr (!neighbours) {
    fold_items(lanes);
  }
  for (std::uint32_t half = width / 2; half > 0; half /= 2) {
    for (int item = 0; item < (neighbours ? kItems : 1); ++item) {
      lanes[item] += __shfl_xor_sync(0xffffffff, lanes[item], half);
    }
  }
  if constexpr (neighbours) {
    fold_items(lanes);
  }
  return lanes[0];
}

// Threads `width` apart hold the lanes of a column. The sums are left with lane 0. exchange: kItems numbers for every second
// thread of the block.
template <class T, int kItems, class Exchange>
KL_EXT_DEVICE void fold_across_block(T (&lanes)[kItems], Exchange exchange, std::uint32_t lane, std::uint32_t lane_count,
                                     std::uint32_t width) {
  for (std::uint32_t half = lane_count / 2; half > 0; half /= 2) {
    const std::uint32_t distance = half * width;
    if (distance < 32) {
      for (int item = 0; item < kItems; ++item) {
        lanes[item] += __shfl_xor_sync(0xffffffff, lanes[item], distance);
      }
      continue;
    }
    // Of 2 * distance threads beside each other, a power of two, the upper half speaks.
    const std::uint32_t place = (threadIdx.x / 2 & ~(distance - 1)) | (threadIdx.x & (distance - 1));
    const bool is_upper = (lane & half) != 0;
    __syncthreads();
    if (is_upper) {
      for (int item = 0; item < kItems; ++item) {
        exchange[item * (kThreads / 2) + place] = lanes[item];
      }
    }
    __syncthreads();
    if (!is_upper) {
      for (int item = 0; item < kItems; ++item) {
        lanes[item] += exchange[item * (kThreads / 2) + place];
      }
    }
  }
}

} // namespace kl_ext::cuda
