// e^x and its relatives in adds, multiplies, fma and bit operations only, without branches or tables: the same bits on every
// processor, and no cancellation near x = 0.
//
//   phi(x) = e^x - 1 - x >= 0      half of it: error <= 2 ulp (largest found: 1.8, over every float with |x| <= 50.5)
//   expm1(x) = e^x - 1             error <= 1.5 ulp (largest found: 1.42)
//
// The argument is written x = k ln 2 + r with k = trunc(x / ln 2). Truncation, and not rounding to nearest, is the point: r has
// the sign of x, and where k is not 0 the terms s (1 + r + phi(r)), s = 2^k, and -1 - x add up without cancelling. In the
// wide range everything is computed as half its value (with s/2), so that a divergence is finite wherever its value is.
#pragma once

#include "platform.h"

namespace kl_ext::math {

template <class T, int n>
constexpr T kTwoTo = n < 0 ? T(1) / T(std::uint64_t{1} << -n) : T(std::uint64_t{1} << n);

// c_0 + c_1 x + c_2 x^2 + ..., with 2^(power + i step) c_i in the place of c_i.
template <int power, int step, class T>
KL_EXT_INLINE T polynomial(T, T c) {
  return kTwoTo<T, power> * c;
}

template <int power, int step, class T, class... More>
KL_EXT_INLINE T polynomial(T x, T c, More... more) {
  return fma(polynomial<power + step, step>(x, more...), x, kTwoTo<T, power> * c);
}

// ln 2 in two parts (k kLn2High is exact for every k in use), and Q of phi(r) = r/2 (r + r^2 Q(r)) for |r| <= ln 2: minimax.
// q<power, step>(x) is 2^power Q(2^step x).
template <class T>
struct Constants;

template <>
struct Constants<float> {
  static constexpr float kLog2E = 0x1.715476p0f;
  static constexpr float kLn2High = 0x1.62e3p-1f;
  static constexpr float kLn2Low = 0x1.2fefa2p-17f;
  template <int power, int step>
  KL_EXT_INLINE static float q(float x) {
    return polynomial<power, step>(x, 0x1.55555ap-2f, 0x1.55555cp-4f, 0x1.110c98p-6f, 0x1.6c1270p-9f, 0x1.a4d838p-12f,
                                   0x1.a38652p-15f);
  }
};

template <>
struct Constants<double> {
  static constexpr double kLog2E = 0x1.71547652b82fep0;
  static constexpr double kLn2High = 0x1.62e42feep-1;
  static constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
  template <int power, int step>
  KL_EXT_INLINE static double q(double x) {
    return polynomial<power, step>(x, 0x1.5555555555554p-2, 0x1.5555555555554p-4, 0x1.11111111115c5p-6, 0x1.6c16c16c17502p-9,
                                   0x1.a01a019eeb7a7p-12, 0x1.a01a019e21e82p-15, 0x1.71de3c5e2ced0p-18, 0x1.27e4fe4e27ab1p-21,
                                   0x1.ae60ef78ecf8ep-25, 0x1.1ee9cc0f83e6fp-28, 0x1.63df50ae91eecp-32, 0x1.97fd8e669b391p-36);
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

// 2^(1 - step) phi(r) / r of x = 2^-step r, for |r| <= ln 2.
template <int step, class T>
KL_EXT_INLINE T phi_over_r(T x) {
  return fma(x * x, Constants<T>::template q<step, step>(x), x);
}

// expm1(r) for |r| <= ln 2.
template <class T>
KL_EXT_INLINE T expm1_reduced(T r) {
  return fma(r, r * fma(Constants<T>::template q<-1, 0>(r), r, T(0.5)), r);
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

// The k of 2^step x = k ln 2 + r, truncated. Wide: where e^x overflows, k stays at the largest exponent and r grows without
// bound, and with it all that is computed from it.
template <Range range, int step, class T>
KL_EXT_INLINE T truncated_quotient(T x) {
  const T k = trunc(x * (kTwoTo<T, step> * Constants<T>::kLog2E));
  if constexpr (range == Range::kWide) {
    constexpr T kLargest = T(Format<T>::kBias + 1);
    return k > kLargest ? kLargest : k;
  }
  return k;
}

// Wide: e^x is lost beside 1 below this x.
template <class T>
constexpr T kLowest = T(-0.6875) * T(Format<T>::kBias);

// Of 2^step x + 2^step error, where |error| is at most half an ulp of x; r is left as 2^-step r.
template <Range range, int step = 0, class T>
KL_EXT_INLINE Reduced<T> reduce(T x, T error) {
  constexpr T kUnit = kTwoTo<T, -step>;
  if constexpr (range == Range::kWide) {
    error = x < kUnit * kLowest<T> ? T(0) : error;
    x = x < kUnit * kLowest<T> ? kUnit * kLowest<T> : x;
  }
  const T k = truncated_quotient<range, step>(x);
  return {k, fma(-k, kUnit * Constants<T>::kLn2High, x) + fma(-k, kUnit * Constants<T>::kLn2Low, error)};
}

// Of 2^step x.
template <Range range, int step = 0, class T>
KL_EXT_INLINE Reduced<T> reduce(T x) {
  constexpr T kUnit = kTwoTo<T, -step>;
  if constexpr (range == Range::kWide) {
    x = x < kUnit * kLowest<T> ? kUnit * kLowest<T> : x;
  }
  const T k = truncated_quotient<range, step>(x);
  return {k, fma(-k, kUnit * Constants<T>::kLn2Low, fma(-k, kUnit * Constants<T>::kLn2High, x))};
}

// x = k ln 2 + r with k the nearest integer, |r| <= ln 2 / 2, for |k| < 2^15.
template <class T>
KL_EXT_INLINE Reduced<T> reduce_to_nearest(T x) {
  using C = Constants<T>;
  constexpr T kShift = static_cast<T>(std::uint64_t{3} << (Format<T>::kMantissaBits - 1));
  const T k = fma(x, C::kLog2E, kShift) - kShift;
  return {k, fma(-k, C::kLn2Low, fma(-k, C::kLn2High, x))};
}

// Half of phi(x), from half of x and its reduction with step 1: finite x may be infinite where its half is not, and so may 2^k
// in the wide range. Where k = 0, all but the product is exactly 0.
template <Range range, class T>
KL_EXT_INLINE T half_phi(T half_x, Reduced<T> half) {
  const T half_scale = power_of_two<-1>(half.k);
  const T linear = range == Range::kNarrow ? power_of_two(half.k) * half.r : half_scale * (half.r + half.r);
  return fma(linear, phi_over_r<1>(half.r), ((half_scale - T(0.5)) - half_x) + linear);
}

// phi(x) where 1/2 is added to it, beside which nothing is seen of what this gives for subnormal x. In the narrow range.
template <class T>
KL_EXT_INLINE T phi(T x, Reduced<T> reduced) {
  const T half_linear = power_of_two<-1>(reduced.k) * reduced.r;
  const T others = ((power_of_two(reduced.k) - T(1)) - x) + (half_linear + half_linear);
  return fma(half_linear, phi_over_r<0>(reduced.r), others);
}

// Half of expm1(x), kTimes: 1 or 2 times.
template <int kTimes = 1, class T>
KL_EXT_INLINE T half_expm1(Reduced<T> x) {
  const T scale = power_of_two<kTimes - 2>(x.k);
  return fma(scale, expm1_reduced(x.r), scale - T(0.5) * T(kTimes));
}

} // namespace kl_ext::math
