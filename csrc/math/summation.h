// The order of every sum, on every device: a sum is a function of its terms, not of threads, layouts or instruction sets.
//
// For terms t_0 ... t_(n-1), in the row-major order of the reduced coordinates, with IEEE additions:
//
//   S(0) = +0
//   S(n <= 1024): 64 lanes a_l = +0; for i ascending a_(i mod 64) += t_i;
//                 for h = 32, 16, 8, 4, 2, 1 and l < h: a_l += a_(l+h); the sum is a_0
//   S(n > 1024):  S of the sums of consecutive chunks of 1024 terms; the last chunk may be shorter
//
// Error: at most h u (|t_0| + ... + |t_(n-1)|), u = 2^-24 or 2^-53, where h is the number of additions a term takes part in:
// 15 + 6 for a full chunk, and again for each level of chunks.
#pragma once

#include "platform.h"

namespace kl_ext::math {

constexpr int kLanes = 64;
constexpr int kChunk = 1024;

// The number of lanes that n terms reach, rounded up to a power of two: the others stay +0, and adding them changes nothing.
KL_EXT_INLINE int lanes_in_use(std::int64_t n) {
  int lanes = 1;
  while (lanes < kLanes && lanes < n) {
    lanes *= 2;
  }
  return lanes;
}

// lanes: [kLanes, columns]; terms: [rows, columns], the first of which goes to lane `first`.
template <class T>
KL_EXT_INLINE void add_to_lanes(T* lanes, const T* terms, int first, std::int64_t rows, std::int64_t columns) {
  while (rows > 0) {
    const std::int64_t run = rows < kLanes - first ? rows : kLanes - first;
    T* into = lanes + first * columns;
    for (std::int64_t i = 0; i < run * columns; ++i) {
      into[i] += terms[i];
    }
    terms += run * columns;
    rows -= run;
    first = 0;
  }
}

// Leaves the sums in the first lane, or in the first `left` lanes.
template <class T>
KL_EXT_INLINE void fold_lanes(T* lanes, int in_use, std::int64_t columns, int left = 1) {
  for (std::int64_t half = in_use / 2; half >= left; half /= 2) {
    const T* upper = lanes + half * columns;
    for (std::int64_t i = 0; i < half * columns; ++i) {
      lanes[i] += upper[i];
    }
  }
}

} // namespace kl_ext::math
