// What lets one header serve host and device. No other file in math/ depends on the compiler.
#pragma once

#include <cstdint>

// Always inlined: the CPU kernels are compiled once per instruction set, and a function that is not inlined would be one weak
// symbol of which the linker keeps a single copy, for the wrong instruction set. The emulation of CUDA has only one instruction
// set; it defines the macro itself, and compiles in less than half the time.
#if defined(KL_EXT_INLINE)
#elif defined(__CUDACC__)
#define KL_EXT_INLINE __host__ __device__ __forceinline__
#else
#define KL_EXT_INLINE inline __attribute__((always_inline))
#endif

// Put before a short loop with a fixed number of turns: if it stayed a loop, the loop around it would not be vectorised, and
// the arrays it indexes would be in memory instead of registers.
#if defined(KL_EXT_UNROLL)
#elif defined(__CUDACC__)
#define KL_EXT_UNROLL _Pragma("unroll")
#else
#define KL_EXT_UNROLL _Pragma("GCC unroll 8")
#endif

// Stands in every struct of numbers that functions return. Clang returns two floats as one vector of two, which it cannot make a
// part of a wider vector later, so that the loop stays scalar. It does not where the struct has a destructor.
#if defined(__clang__) && !defined(__CUDACC__)
#define KL_EXT_APART(Struct) \
  KL_EXT_INLINE ~Struct() {}
#else
#define KL_EXT_APART(Struct)
#endif

namespace kl_ext::math {

// The unsigned integer as wide as T, the number of T's mantissa bits without the implicit one, and T's exponent bias.
template <class T>
struct Format;

template <>
struct Format<float> {
  using Bits = std::uint32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr int kBias = 127;
  static constexpr float kMax = 0x1.fffffep127f;
  static constexpr float kInfinity = __builtin_huge_valf();
};

template <>
struct Format<double> {
  using Bits = std::uint64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr int kBias = 1023;
  static constexpr double kMax = 0x1.fffffffffffffp1023;
  static constexpr double kInfinity = __builtin_huge_val();
};

// GCC has it from version 11 on.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 11
#define KL_EXT_HAS_BIT_CAST 0
#else
#define KL_EXT_HAS_BIT_CAST 1
#endif

template <class T>
KL_EXT_INLINE typename Format<T>::Bits to_bits(T x) {
#if KL_EXT_HAS_BIT_CAST
  return __builtin_bit_cast(typename Format<T>::Bits, x);
#else
  typename Format<T>::Bits result;
  __builtin_memcpy(&result, &x, sizeof(result));
  return result;
#endif
}

template <class T>
KL_EXT_INLINE T from_bits(typename Format<T>::Bits bits) {
#if KL_EXT_HAS_BIT_CAST
  return __builtin_bit_cast(T, bits);
#else
  T result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
#endif
}

// IEEE operations with one rounding. Contraction is off everywhere, so operations are fused only where fma is written.
#if defined(__CUDA_ARCH__)
KL_EXT_INLINE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
KL_EXT_INLINE double fma(double a, double b, double c) { return ::fma(a, b, c); }
KL_EXT_INLINE float trunc(float x) { return ::truncf(x); }
KL_EXT_INLINE double trunc(double x) { return ::trunc(x); }
KL_EXT_INLINE float floor(float x) { return ::floorf(x); }
KL_EXT_INLINE double floor(double x) { return ::floor(x); }
KL_EXT_INLINE float abs(float x) { return ::fabsf(x); }
KL_EXT_INLINE double abs(double x) { return ::fabs(x); }
#else
KL_EXT_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
KL_EXT_INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
KL_EXT_INLINE float trunc(float x) { return __builtin_truncf(x); }
KL_EXT_INLINE double trunc(double x) { return __builtin_trunc(x); }
KL_EXT_INLINE float floor(float x) { return __builtin_floorf(x); }
KL_EXT_INLINE double floor(double x) { return __builtin_floor(x); }
KL_EXT_INLINE float abs(float x) { return __builtin_fabsf(x); }
KL_EXT_INLINE double abs(double x) { return __builtin_fabs(x); }
#endif

// max(x, low) and min(x, high) for bounds that are not NaN; NaN stays NaN. (sm_80 has instructions for float, which the
// compiler does not find by itself; they treat +0 as larger than -0.)
template <class T>
KL_EXT_INLINE T at_least(T x, T low) {
  return x < low ? low : x;
}

template <class T>
KL_EXT_INLINE T at_most(T x, T high) {
  return x > high ? high : x;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
KL_EXT_INLINE float at_least(float x, float low) {
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(low));
  return x;
}

KL_EXT_INLINE float at_most(float x, float high) {
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(high));
  return x;
}
#endif

// Whether low <= x <= high. On the CPU this reuses the clamped x, since a comparison costs as much as a multiplication; on a
// GPU, keeping that would take registers.
template <class T>
KL_EXT_INLINE bool is_within(T x, T low, T high) {
#if defined(__CUDA_ARCH__)
  return (x >= low) & (x <= high);
#else
  return at_most(at_least(x, low), high) == x;
#endif
}

} // namespace kl_ext::math
