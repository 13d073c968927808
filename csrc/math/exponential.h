// e^x and its relatives in adds, multiplies, fma and bit operations only, without branches or tables: the same bits on every
// processor, and no cancellation near x = 0.
//
//   phi(x) = e^x - 1 - x >= 0      error <= 2 ulp (largest found: 1.9, over every float with |x| <= 50.5)
//   expm1(x) = e^x - 1             error <= 1.5 ulp (largest found: 1.2)
//
// The argument is written x = k ln 2 + r with k = trunc(x / ln 2). Truncation, and not rounding to nearest, is the point: r has
// the sign of x, and where k is not 0 the terms s (1 + r + phi(r)), s = 2^k, and -1 - x add up without cancelling. Everything
// is computed as half its value (with s/2), so that a divergence is finite wherever its value is.
#pragma once

#include "platform.h"

namespace kl_ext::math {

// ln 2 in two parts (k kLn2High is exact for every k in use), and Q of 2 phi(r) = r^2 + r^3 Q(r) for |r| <= ln 2: minimax.
template <class T>
struct Constants;

template <>
struct Constants<float> {
  static constexpr float kLog2E = 0x1.715476p0f;
  static constexpr float kLn2High = 0x1.62e3p-1f;
  static constexpr float kLn2Low = 0x1.2fefa2p-17f;
  KL_EXT_INLINE static float q(float r) {
    float q = 0x1.a38652p-15f;
    q = fma(q, r, 0x1.a4d838p-12f);
    q = fma(q, r, 0x1.6c1270p-9f);
    q = fma(q, r, 0x1.110c98p-6f);
    q = fma(q, r, 0x1.55555cp-4f);
    return fma(q, r, 0x1.55555ap-2f);
  }
};

template <>
struct Constants<double> {
  static constexpr double kLog2E = 0x1.71547652b82fep0;
  static constexpr double kLn2High = 0x1.62e42feep-1;
  static constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
  KL_EXT_INLINE static double q(double r) {
    double q = 0x1.97fd8e669b391p-36;
    q = fma(q, r, 0x1.63df50ae91eecp-32);
    q = fma(q, r, 0x1.1ee9cc0f83e6fp-28);
    q = fma(q, r, 0x1.ae60ef78ecf8ep-25);
    q = fma(q, r, 0x1.27e4fe4e27ab1p-21);
    q = fma(q, r, 0x1.71de3c5e2ced0p-18);
    q = fma(q, r, 0x1.a01a019e21e82p-15);
    q = fma(q, r, 0x1.a01a019eeb7a7p-12);
    q = fma(q, r, 0x1.6c16c16c17502p-9);
    q = fma(q, r, 0x1.11111111115c5p-6);
    q = fma(q, r, 0x1.5555555555554p-4);
    return fma(q, r, 0x1.5555555555554p-2);
  }
};

// 2^(k + more) for an integral k, with the sum in the exponent range of normal numbers, and infinity for the one above it.
// Adding 1.5 * 2^mantissa leaves k in the low bits.
template <int more = 0, class T>
KL_EXT_INLINE T power_of_two(T k) {
  using F = Format<T>;
  constexpr T kShift = static_cast<T>(std::uint64_t{3} << (F::kMantissaBits - 1));
  constexpr auto kFactor = static_cast<typename F::Bits>(F::kBias + more) << F::kMantissaBits;
  return from_bits<T>((to_bits<T>(k + kShift) << F::kMantissaBits) + kFactor);
}

// 2 phi(r) for |r| <= ln 2: doubled, it takes a multiplication less, and those are what a processor has fewest of.
template <class T>
KL_EXT_INLINE T twice_phi(T r) {
  return fma(r, r, (r * r) * (r * Constants<T>::q(r)));
}

// 2 expm1(r) likewise.
template <class T>
KL_EXT_INLINE T twice_expm1(T r) {
  return (r + r) + twice_phi(r);
}

// x = k ln 2 + r.
template <class T>
struct Reduced {
  T k;
  T r;
};

// How wide the clamped log-variances may range. kNarrow: no power of two in use leaves the exponent range, which every clamp
// within +-kNarrowBound guarantees. kWide: any clamp, infinite ones included.
enum class Range { kNarrow, kWide };

template <class T>
constexpr T kNarrowBound = sizeof(T) == 4 ? T(43) : T(350);

// The k of x = k ln 2 + r, truncated. Wide: where e^x overflows, k stays at the largest exponent and r grows without bound, and
// with it all that is computed from it.
template <Range range, class T>
KL_EXT_INLINE T truncated_quotient(T x) {
  const T k = trunc(x * Constants<T>::kLog2E);
  if constexpr (range == Range::kWide) {
    constexpr T kLargest = T(Format<T>::kBias + 1);
    return k > kLargest ? kLargest : k;
  }
  return k;
}

// Wide: e^x is lost beside 1 below this x.
template <class T>
constexpr T kLowest = T(-0.6875) * T(Format<T>::kBias);

template <Range range, class T>
KL_EXT_INLINE Reduced<T> reduce(T x) {
  using C = Constants<T>;
  if constexpr (range == Range::kWide) {
    x = x < kLowest<T> ? kLowest<T> : x;
  }
  const T k = truncated_quotient<range>(x);
  return {k, fma(-k, C::kLn2Low, fma(-k, C::kLn2High, x))};
}

// Of x + error, where |error| is at most half an ulp of x.
template <Range range, class T>
KL_EXT_INLINE Reduced<T> reduce(T x, T error) {
  using C = Constants<T>;
  if constexpr (range == Range::kWide) {
    error = x < kLowest<T> ? T(0) : error;
    x = x < kLowest<T> ? kLowest<T> : x;
  }
  const T k = truncated_quotient<range>(x);
  return {k, fma(-k, C::kLn2High, x) + fma(-k, C::kLn2Low, error)};
}

// x = k ln 2 + r with k the nearest integer, |r| <= ln 2 / 2, for |k| < 2^15.
template <class T>
KL_EXT_INLINE Reduced<T> reduce_to_nearest(T x) {
  using C = Constants<T>;
  constexpr T kShift = static_cast<T>(std::uint64_t{3} << (Format<T>::kMantissaBits - 1));
  const T k = fma(x, C::kLog2E, kShift) - kShift;
  return {k, fma(-k, C::kLn2Low, fma(-k, C::kLn2High, x))};
}

// Half of phi(x), from half of x and the reduction of x: finite x may be infinite where its half is not.
template <class T>
KL_EXT_INLINE T half_phi(T half_x, Reduced<T> x) {
  const T half_scale = power_of_two<-1>(x.k);
  return fma(power_of_two<-2>(x.k), twice_phi(x.r), fma(half_scale, x.r, (half_scale - T(0.5)) - half_x));
}

// scale expm1(x.r) + more, with scale = 2^(x.k + power). A GPU halves in an fma, for which it needs neither the doubling nor
// another power of two; the bits are the same, since doubling is exact, and what is too small for that to hold has no phi.
template <int power, class T>
KL_EXT_INLINE T add_scaled_expm1(Reduced<T> x, [[maybe_unused]] T scale, T more) {
#if defined(__CUDA_ARCH__)
  return fma(scale, fma(T(0.5), twice_phi(x.r), x.r), more);
#else
  return fma(power_of_two<power - 1>(x.k), twice_expm1(x.r), more);
#endif
}

// Half of expm1(x).
template <class T>
KL_EXT_INLINE T half_expm1(Reduced<T> x) {
  const T half_scale = power_of_two<-1>(x.k);
  return add_scaled_expm1<-1>(x, half_scale, half_scale - T(0.5));
}

} // namespace kl_ext::math
