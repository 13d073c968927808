// e^x and its relatives by additions, multiplications, fma and bit operations only, without branches or tables: the same bits
// on every processor, and no cancellation near x = 0.
//
//   phi(x) = e^x - 1 - x >= 0      half of it has error <= 2 ulp (largest found: 1.91)
//   expm1(x) = e^x - 1             error <= 1.5 ulp (largest found: 1.34)
//
// (float: all numbers with |x| <= 50.5, double: random ones.) The argument is written x = k ln 2 + r, s = 2^k.
//
// For phi, k = trunc(x / ln 2). It must be truncation, not rounding to nearest: r then has the sign of x, and where k is not 0
// the terms s (1 + r + phi(r)) and -1 - x add up without cancelling.
//
// For expm1, k is the floor for which 3/4 <= e^r <= 3/2: r is smaller, and s expm1(r) + (s - 1) loses least. The worst cases
// are next to k = 0, where the sum falls to 1/2 (k = 1) and -1/4 (k = -1) while the ulp of expm1(r) grows with its size: it
// doubles at -1/4 and 1/2, which are exactly those ends.
//
// In the wide range half of each value is computed (with s/2), so that a divergence is finite wherever its true value is.
#pragma once

#include "platform.h"

namespace kl_ext::math {

template <class T, int n>
constexpr T kTwoTo = n < 0 ? T(1) / T(std::uint64_t{1} << -n) : T(std::uint64_t{1} << n);

// c_0 + c_2 x^2 + c_4 x^4 + ..., with 2^(power + i step) c_i in place of c_i.
template <int power, int step, class T>
KL_EXT_INLINE T every_other_term(T, T c) {
  return kTwoTo<T, power> * c;
}

template <int power, int step, class T>
KL_EXT_INLINE T every_other_term(T, T c, T) {
  return kTwoTo<T, power> * c;
}

template <int power, int step, class T, class... More>
KL_EXT_INLINE T every_other_term(T square, T c, T, More... more) {
  return fma(every_other_term<power + 2 * step, step>(square, more...), square, kTwoTo<T, power> * c);
}

// c_0 + c_1 x + c_2 x^2 + ..., scaled in the same way, from x and x^2: as many operations as Horner's rule, half the latency.
template <int power, int step, class T, class... More>
KL_EXT_INLINE T polynomial(T x, T square, T c, More... more) {
  return fma(every_other_term<power + step, step>(square, more...), x, every_other_term<power, step>(square, c, more...));
}

// ln 2 in two parts (k kLn2High is exact for every k in use), and minimax polynomials: Q of phi(r) = r/2 (r + r^2 Q(r)) for
// |r| <= ln 2, and C of expm1(r) = r + r^2 C(r) for e^r from 1/sqrt(2) to 3/2, which takes fewer coefficients.
// q<step>(x) is 2^step Q(2^step x).
template <class T>
struct Constants;

template <>
struct Constants<float> {
  static constexpr float kLog2E = 0x1.715476p0f;
  static constexpr float kTwoMinusLog2Of3 = 0x1.a8ff98p-2f;
  static constexpr float kLn2High = 0x1.62e3p-1f;
  static constexpr float kLn2Low = 0x1.2fefa2p-17f;
  template <int step>
  KL_EXT_INLINE static float q(float x, float square) {
    return polynomial<step, step>(x, square, 0x1.55555ap-2f, 0x1.55555cp-4f, 0x1.110c98p-6f, 0x1.6c1270p-9f, 0x1.a4d838p-12f,
                                  0x1.a38652p-15f);
  }
  KL_EXT_INLINE static float c(float r, float square) {
    return polynomial<0, 0>(r, square, 0x1p-1f, 0x1.555558p-3f, 0x1.5554d4p-5f, 0x1.110ac8p-7f, 0x1.6d65d2p-10f,
                            0x1.abbf40p-13f);
  }
};

template <>
struct Constants<double> {
  static constexpr double kLog2E = 0x1.71547652b82fep0;
  static constexpr double kTwoMinusLog2Of3 = 0x1.a8ff971810a5ep-2;
  static constexpr double kLn2High = 0x1.62e42feep-1;
  static constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
  template <int step>
  KL_EXT_INLINE static double q(double x, double square) {
    return polynomial<step, step>(x, square, 0x1.5555555555554p-2, 0x1.5555555555554p-4, 0x1.11111111115c5p-6,
                                  0x1.6c16c16c17502p-9, 0x1.a01a019eeb7a7p-12, 0x1.a01a019e21e82p-15, 0x1.71de3c5e2ced0p-18,
                                  0x1.27e4fe4e27ab1p-21, 0x1.ae60ef78ecf8ep-25, 0x1.1ee9cc0f83e6fp-28, 0x1.63df50ae91eecp-32,
                                  0x1.97fd8e669b391p-36);
  }
  KL_EXT_INLINE static double c(double r, double square) {
    return polynomial<0, 0>(r, square, 0x1p-1, 0x1.555555555555ap-3, 0x1.5555555555609p-5, 0x1.111111110f01bp-7,
                            0x1.6c16c16bb93a8p-10, 0x1.a01a01b28726ap-13, 0x1.a01a03a312855p-16, 0x1.71ddf20828203p-19,
                            0x1.27e0726f040c3p-22, 0x1.af68dce57ada4p-26, 0x1.2652d2325babfp-29);
  }
};

// An integral k is stored as k + kShift, which has k in its low bits.
template <class T>
constexpr T kShift = static_cast<T>(std::uint64_t{3} << (Format<T>::kMantissaBits - 1));

// The bits that add k to an exponent.
template <class T>
KL_EXT_INLINE typename Format<T>::Bits in_exponent(T shifted_k) {
  return to_bits(shifted_k) << Format<T>::kMantissaBits;
}

// 2^(k + more) where the sum is in the exponent range of normal numbers, and infinity where it is one above.
template <int more = 0, class T>
KL_EXT_INLINE T power_of_two(T shifted_k) {
  using F = Format<T>;
  return from_bits<T>(in_exponent(shifted_k) + (static_cast<typename F::Bits>(F::kBias + more) << F::kMantissaBits));
}

// 2^k x for normal x and results, and for any x if k is 0. NaN may become a number.
template <class T>
KL_EXT_INLINE T times_power_of_two(T x, T shifted_k) {
  return from_bits<T>(to_bits(x) + in_exponent(shifted_k));
}

// 2^(1 - step) phi(r) / r for x = 2^-step r, |r| <= ln 2.
template <int step, class T>
KL_EXT_INLINE T phi_over_r(T x) {
  const T square = x * x;
  return fma(square, Constants<T>::template q<step>(x, square), x);
}

// expm1(r) for e^r from 1/sqrt(2) to 3/2.
template <class T>
KL_EXT_INLINE T expm1_of_rest(T r) {
  const T square = r * r;
  return fma(square, Constants<T>::c(r, square), r);
}

// x = k ln 2 + r.
template <class T>
struct Split {
  T shifted_k;
  T r;

  KL_EXT_APART(Split)
};

// How wide the clamped log-variances may range. kNarrow: no power of two in use leaves the exponent range, which every clamp
// within +-kNarrowBound guarantees. kWide: any clamp, infinite ones included.
enum class Range { kNarrow, kWide };

template <class T>
constexpr T kNarrowBound = sizeof(T) == 4 ? T(43) : T(350);

// Which function the quotient is for; see above.
enum class Use { kPhi, kExpm1 };

// The k of 2^step x = k ln 2 + r. Wide: where e^x overflows, k stays at the largest exponent, and r and all that is computed
// from it grow without bound.
template <Range range, int step, Use use, class T>
KL_EXT_INLINE T quotient(T x) {
  constexpr T kFactor = kTwoTo<T, step> * Constants<T>::kLog2E;
  const T k = use == Use::kPhi ? trunc(x * kFactor) : floor(fma(x, kFactor, Constants<T>::kTwoMinusLog2Of3));
  if constexpr (range == Range::kWide) {
    constexpr T kLargest = T(Format<T>::kBias + (use == Use::kPhi ? 1 : 2));
    return k > kLargest ? kLargest : k;
  }
  return k;
}

// Wide: below this x, e^x is negligible against 1.
template <class T>
constexpr T kLowest = T(-0.625) * T(Format<T>::kBias);

// Splits 2^step x + 2^step error, where |error| is at most half an ulp of x; returns 2^-step r.
template <Range range, int step = 0, Use use = Use::kPhi, class T>
KL_EXT_INLINE Split<T> split(T x, T error) {
  constexpr T kUnit = kTwoTo<T, -step>;
  if constexpr (range == Range::kWide) {
    error = x < kUnit * kLowest<T> ? T(0) : error;
    x = x < kUnit * kLowest<T> ? kUnit * kLowest<T> : x;
  }
  const T k = quotient<range, step, use>(x);
  return {k + kShift<T>, fma(-k, kUnit * Constants<T>::kLn2High, x) + fma(-k, kUnit * Constants<T>::kLn2Low, error)};
}

// Splits 2^step x; returns 2^-step r.
template <Range range, int step = 0, Use use = Use::kPhi, class T>
KL_EXT_INLINE Split<T> split(T x) {
  constexpr T kUnit = kTwoTo<T, -step>;
  if constexpr (range == Range::kWide) {
    x = x < kUnit * kLowest<T> ? kUnit * kLowest<T> : x;
  }
  const T k = quotient<range, step, use>(x);
  return {k + kShift<T>, fma(-k, kUnit * Constants<T>::kLn2Low, fma(-k, kUnit * Constants<T>::kLn2High, x))};
}

// x = k ln 2 + r with k the nearest integer, |r| <= ln 2 / 2, for |k| < 2^15.
template <class T>
KL_EXT_INLINE Split<T> split_at_nearest(T x) {
  using C = Constants<T>;
  const T shifted_k = fma(x, C::kLog2E, kShift<T>);
  const T k = shifted_k - kShift<T>;
  return {shifted_k, fma(-k, C::kLn2Low, fma(-k, C::kLn2High, x))};
}

// Whether x was split with an error. Without one, x is so far from every k ln 2 that 2^k r is a normal number unless k = 0, and
// k can be added to its exponent. With an error, r may be 0 or tiny for any k.
enum class Exactness { kExact, kWithError };

// Half of phi(x), from half of x and its split with step 1: x may overflow where its half does not, and so may 2^k in the wide
// range. Where k = 0, all but the product is exactly 0. The other factor and half_x propagate NaN.
template <Range range, Exactness exactness, class T>
KL_EXT_INLINE T half_phi(T half_x, Split<T> half) {
  const T half_scale = power_of_two<-1>(half.shifted_k);
  const T linear = range == Range::kWide            ? half_scale * (half.r + half.r)
                   : exactness == Exactness::kExact ? times_power_of_two(half.r, half.shifted_k)
                                                    : power_of_two(half.shifted_k) * half.r;
  return fma(linear, phi_over_r<1>(half.r), ((half_scale - T(0.5)) - half_x) + linear);
}

// Half of expm1(x), from x split for kExpm1. Wide: computes a quarter first, since half of expm1 is still finite where half of
// 2^k is not; but where k = 0, a quarter might be subnormal.
template <Range range, class T>
KL_EXT_INLINE T half_expm1(Split<T> x) {
  constexpr int kPower = range == Range::kWide ? -2 : -1;
  const T scale = power_of_two<kPower>(x.shifted_k);
  const T of_r = expm1_of_rest(x.r);
  const T result = fma(scale, of_r, scale - kTwoTo<T, kPower>);
  if constexpr (range == Range::kWide) {
    return x.shifted_k == kShift<T> ? kTwoTo<T, kPower + 1> * of_r : result + result;
  }
  return result;
}

} // namespace kl_ext::math
