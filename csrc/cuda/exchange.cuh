// Folds lanes across threads, in the order of math/summation.h: lane l takes lane l + h, for h from half the lanes down to 1,
// halved each time. All threads of a warp, or of the block, must call these together.
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

// Each of `width` neighbouring threads holds consecutive lanes (neighbours), or the lanes thread + width * item. All of them
// get the sum.
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

// Threads `width` apart hold the lanes of a column. Lane 0 gets the sums. exchange: room for kItems numbers for every second
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
    // Of 2 * distance neighbouring threads, a power of two, the upper half writes.
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
