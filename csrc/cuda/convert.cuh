// The conversions of math/half.h on the device, where they are single instructions. NaN payloads may differ.
#pragma once

#include "../math/half.h"
#include "kernels.h"
#include "launch.cuh"

#if defined(__CUDA_ARCH__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace kl_ext::cuda {

template <class S>
KL_EXT_INLINE auto widened(S x) {
  return math::widen(x);
}

// Two numbers at a time, as the instructions do.
template <class S, class T>
KL_EXT_INLINE void narrow_pair(S& first, S& second, T x, T y) {
  math::narrow(first, x);
  math::narrow(second, y);
}

// Rounds numbers to a dtype that is known at run time, and stores the valid ones, `stride` apart.
template <class T, int kItems>
KL_EXT_INLINE void store_rounded(void* to, Storage dtype, std::int64_t first, std::int64_t stride, std::int64_t valid,
                                 const T (&numbers)[kItems]) {
  const auto store = [&](auto* rounded) {
    KL_EXT_UNROLL
    for (int item = 0; item < kItems; ++item) {
      if (item < valid) {
        math::narrow(rounded[first + item * stride], numbers[item]);
      }
    }
  };
  switch (dtype) {
    case kFloat16:
      store(static_cast<math::Half*>(to));
      break;
    case kBFloat16:
      store(static_cast<math::BFloat16*>(to));
      break;
    case kFloat32:
      store(static_cast<float*>(to));
      break;
    default:
      store(static_cast<T*>(to)); // float64 only if T is double
  }
}

#if defined(__CUDA_ARCH__)
KL_EXT_INLINE float widened(math::Half x) { return __half2float(__ushort_as_half(x.bits)); }

KL_EXT_INLINE void narrow_pair(math::Half& first, math::Half& second, float x, float y) {
  const __half2 pair = __floats2half2_rn(x, y);
  first.bits = __half_as_ushort(pair.x);
  second.bits = __half_as_ushort(pair.y);
}

KL_EXT_INLINE void narrow_pair(math::BFloat16& first, math::BFloat16& second, float x, float y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  first.bits = __bfloat16_as_ushort(pair.x);
  second.bits = __bfloat16_as_ushort(pair.y);
}
#endif

} // namespace kl_ext::cuda
