// The divergence of two Gaussians from their standard deviations p and q, and its derivatives, per element, in nats. No other
// file has these formulas. With D = mu_p - mu_q, r = p / q = 2^k (1 + f) where 0.73 <= 1 + f <= 1.46, and x = D / q:
//
//   KL = ((r^2 - 1) / 2 - ln r) + x^2 / 2
//      = [(4^k - 1) / 2 - k ln 2] + (4^k - 1) f + f^2 ((4^k + 1) / 2 + f Q(f)) + x^2 / 2
//   dKL/dmu_p = D / q^2 = -dKL/dmu_q
//   dKL/dp    = (p - q)(p + q) / (p q^2) = (p - q) / q^2 + (p - q) / (p q)
//   dKL/dq    = -[D^2 / q^3 + (p - q) / q^2 ((p - q) / q + 2)]
//
// Next to p = q, k is 0, f comes exactly from p - q, and everything but the last two terms is exactly 0. Against N(0, 1):
// mu_q = 0, q = 1. Error bounds, for finite means and positive finite deviations, including subnormal ones, in ulps of the
// result (largest found in float and double in brackets):
//
//   KL                             4.5 (4.0, 3.9)
//   gradients of means             4.5 (3.3, 2.9)
//     where they and D / q are at least 16 times the least normal number: 2.5 (1.9, 1.9)
//   gradient of p                  4 (3.8, 3.8)
//   gradient of q                  9 (7.9, 8.3) of the larger of its two terms
//     where p >= q                 8 (5.5, 4.7) of itself
//   against N(0, 1): KL            3 (2.8, 2.5)
//   against N(0, 1): gradient      1.5 (1.0, 1.0)
//
// Values are never negative, exactly 0 where p = q, and infinite only where the true value overflows: r, r^2, D or 1 / q^2 may
// be out of range where the result is not. Nothing is clamped and the deviations are unknown before the call, so there is only
// one range: a fast path for usual numbers would be chosen for several neighbours at once, and bits would depend on neighbours.
//
// NaN propagates. A negative deviation makes the value and the gradients of deviations NaN; a q that is negative or 0 makes the
// gradients of means NaN as well. As in the plain formula, the value is infinite where p is 0 or q is infinite, NaN where p is
// infinite or q is 0, and infinite where the difference of means is, unless q is infinite as well. The gradient of a p of 0 is
// -inf. An infinite q makes every gradient NaN. An infinite p makes its own gradient NaN and that of q -inf; against N(0, 1),
// its own is inf.
//
// The second derivatives: each row of the Hessian times a direction v. v_D and v_d are the differences (that of p minus that of
// q) of the directions of means and of deviations, v_q is the direction of q, and d = (p - q) / q:
//
//   mu_p:  (v_D - 2 x v_q) / q^2, and its opposite for mu_q
//   p:     [(1 + 1 / r^2) v_d - d (2 + 1 / r + 1 / r^2) v_q] / q^2
//   q:     [d (3 r + 1) v_q - 2 r v_d + x (3 x v_q - 2 v_D)] / q^2
//
// Next to p = q only the terms of v_d cancel. Against N(0, 1): v_mu, and (1 + 1 / p^2) v_p.
#pragma once

#include "gaussian.h"

namespace kl_ext::math {

// Q of f - log1p f = f^2 (1/2 + f Q(f)), for f from -0.2725 to 0.468, over which f Q(f) is off by at most a tenth of an
// ulp of 1/2. q<power>(f, f^2) is 2^power Q(f).
template <class T>
struct RatioConstants;

template <>
struct RatioConstants<float> {
  template <int power>
  KL_EXT_INLINE static float q(float f, float square) {
    return polynomial<power, 0>(f, square, -0x1.555550p-2f, 0x1.000034p-2f, -0x1.999fbap-3f, 0x1.553c50p-3f, -0x1.238f48p-3f,
                                0x1.0111e6p-3f, -0x1.e7acaep-4f, 0x1.b36dccp-4f, -0x1.b3b954p-5f);
  }
};

template <>
struct RatioConstants<double> {
  template <int power>
  KL_EXT_INLINE static double q(double f, double square) {
    return polynomial<power, 0>(f, square, -0x1.5555555555551p-2, 0x1.ffffffffffe9ep-3, -0x1.999999999ae67p-3,
                                0x1.5555555574950p-3, -0x1.24924923d03edp-3, 0x1.ffffffe0e7f73p-4, -0x1.c71c7216fc94dp-4,
                                0x1.9999a130fab9dp-4, -0x1.745d144e21712p-4, 0x1.55545109751c0p-4, -0x1.3b12858afe0b2p-4,
                                0x1.24a59e86ce579p-4, -0x1.114103cfe46eep-4, 0x1.fe969cdde0aa6p-5, -0x1.dbd6b0a1db0c7p-5,
                                0x1.c961290351586p-5, -0x1.d99e2734e6711p-5, 0x1.d2687c70bd1a5p-5, -0x1.453ad716064d6p-5,
                                0x1.ac2bd0a44666cp-7);
  }
};

// The bits of 2^n, for n in the exponent range of normal numbers; for the next larger n, those of infinity.
template <class T, int n>
constexpr typename Format<T>::Bits kBitsOfTwoTo =
    static_cast<typename Format<T>::Bits>(Format<T>::kBias + n) << Format<T>::kMantissaBits;

// A NaN whose lower half is 0, as round_to_bfloat16 requires.
template <class T>
KL_EXT_INLINE T not_a_number() {
  constexpr typename Format<T>::Bits kInfinity = kBitsOfTwoTo<T, Format<T>::kBias + 1>;
  return from_bits<T>(kInfinity | kInfinity >> 1);
}

// min(x, 2^n) and max(x, 2^n) for positive x, as integers: for floating-point selects between constants gcc makes a path for
// each outcome, and computes all that follows, divisions too, on each.
template <int n, class T>
KL_EXT_INLINE T at_most_power_of_two(T x) {
  constexpr typename Format<T>::Bits kPower = kBitsOfTwoTo<T, n>;
  return from_bits<T>(to_bits(x) < kPower ? to_bits(x) : kPower);
}

template <int n, class T>
KL_EXT_INLINE T at_least_power_of_two(T x) {
  constexpr typename Format<T>::Bits kPower = kBitsOfTwoTo<T, n>;
  return from_bits<T>(to_bits(x) > kPower ? to_bits(x) : kPower);
}

// A deviation times a power of two, exactly.
template <class T>
struct ScaledDeviation {
  T value;
  T factor;
  typename Format<T>::Bits exponent; // biased; subtracting that of another deviation gives the ratio of the factors

  KL_EXT_APART(ScaledDeviation)
};

// The value is from 1/2 to 1, times 2^-lower; less for subnormal deviations, and up to 2^8 for the largest. For those the
// factor stays at 2^-120 (double: 2^-1016): its product with another factor and a difference of deviations is then exact, and
// loses no bits as a subnormal number would. The factor is a power of two whatever x is.
template <int lower = 0, class T>
KL_EXT_INLINE ScaledDeviation<T> scale_deviation(T x) {
  using F = Format<T>;
  using Bits = typename F::Bits;
  constexpr Bits kExponentField = kBitsOfTwoTo<T, F::kBias + 1>;
  constexpr Bits kLargest = kBitsOfTwoTo<T, F::kBias - 8 - lower>;
  const Bits field = to_bits(x) & kExponentField;
  const Bits exponent = field < kLargest ? field : kLargest;
  const T factor = from_bits<T>(kBitsOfTwoTo<T, F::kBias - 1 - lower> - exponent);
  return {x * factor, factor, exponent};
}

// The n for which 2^-n ratio is from 0.73 to 1.46, |n| < 64. With 3/4 instead of 0.73, f would reach 1/2, where for k = -1 the
// divergence is small but its summands are not: that would lose an ulp. For ratios of 0, infinity and NaN, n is meaningless.
template <class T>
struct Octave {
  static constexpr int kBias = 64;

  T inverse;                         // 2^-n
  typename Format<T>::Bits biased_n; // n + kBias

  KL_EXT_APART(Octave)
};

template <class T>
KL_EXT_INLINE Octave<T> octave_of(T ratio) {
  using F = Format<T>;
  using Bits = typename F::Bits;
  constexpr Bits kLowest = kBitsOfTwoTo<T, -1> + (Bits{59} << (F::kMantissaBits - 7)); // 0.73046875
  constexpr Bits kOctaves = static_cast<Bits>(Octave<T>::kBias) << F::kMantissaBits;
  constexpr Bits kMantissa = (Bits{1} << F::kMantissaBits) - 1;
  const Bits bits = to_bits(ratio) + (kOctaves - kLowest);
  return {from_bits<T>(kBitsOfTwoTo<T, Octave<T>::kBias> - (bits & ~kMantissa)), bits >> F::kMantissaBits};
}

// k of r = p / q = 2^k (1 + f), and 4^k / 8. 4^k is limited: upwards to where the value overflows anyway, downwards to where it
// is negligible against 1.
template <class T>
struct RatioExponent {
  T k;
  T eighth_square;

  KL_EXT_APART(RatioExponent)
};

template <class T>
KL_EXT_INLINE RatioExponent<T> ratio_exponent(typename Format<T>::Bits p, typename Format<T>::Bits q, Octave<T> octave) {
  using F = Format<T>;
  using Bits = typename F::Bits;
  // The difference of two exponents needs one more bit than an exponent, for the sign.
  constexpr Bits kDifferences = Bits{1} << (8 * sizeof(Bits) - 1);
  constexpr Bits kZero = 2 * (F::kBias + 1) + Octave<T>::kBias;
  constexpr Bits kHighest = kZero + (F::kBias + 3) / 2;
  constexpr Bits kLowest = kZero - (F::kBias - 15) / 2;
  const Bits biased = ((p - q + kDifferences) >> F::kMantissaBits) + octave.biased_n;
  const Bits not_low = biased > kLowest ? biased : kLowest;
  const Bits limited = not_low < kHighest ? not_low : kHighest;
  return {from_bits<T>(to_bits(kShift<T>) + (biased - kZero)) - kShift<T>,
          from_bits<T>((limited << (F::kMantissaBits + 1)) + ((F::kBias - 3 - 2 * kZero) << F::kMantissaBits))};
}

// (r^2 - 1) / 2 - ln r, computed as an eighth of itself, so that no intermediate result overflows where the value does not.
template <class T>
KL_EXT_INLINE T ratio_divergence(RatioExponent<T> r, T f) {
  using C = Constants<T>;
  const T slope = r.eighth_square - T(0.125);
  const T square = f * f;
  const T curve = fma(f, RatioConstants<T>::template q<-3>(f, square), fma(T(0.5), r.eighth_square, T(0.0625)));
  const T constant = fma(r.k, T(-0.125) * C::kLn2High, T(0.5) * slope);
  const T linear = fma(r.k, T(-0.125) * C::kLn2Low, fma(slope, f, constant));
  // Rounds f curve, not f^2: its ulp is smaller where that of the sum is smallest, just below f^2 for k = 0.
  return T(8) * fma(f * curve, f, linear);
}

// The divergence, or its special value: where p is 0 or q is infinite (ratio 0), and where a deviation is invalid.
template <class T>
KL_EXT_INLINE T or_special(T divergence, T ratio, bool deviations) {
  const T or_infinite = ratio == T(0) ? Format<T>::kInfinity : divergence;
  return (deviations & (ratio < Format<T>::kInfinity)) ? or_infinite : not_a_number<T>();
}

// (mu_p - mu_q) factor. A factor below 1 is applied before the subtraction, which might overflow, one above 1 after it.
template <class T>
KL_EXT_INLINE T scaled_difference(T mu_p, T mu_q, T factor) {
  const T down = at_most_power_of_two<0>(factor);
  return fma(mu_p, down, -(mu_q * down)) * at_least_power_of_two<0>(factor);
}

// The formulas, for all kernels: inputs in the order of the operators' arguments. Range and settings have no effect here.

struct NormalDivergence : Formula {
  static constexpr bool kRanges = false;
  static constexpr int kInputs = 4;
  static constexpr int kGradients = 4;

  template <Range range, class T>
  KL_EXT_INLINE static T forward(const T (&input)[kInputs], Settings<T>) {
    const ScaledDeviation<T> p = scale_deviation(input[1]);
    const ScaledDeviation<T> q = scale_deviation(input[3]);
    const T inverse = T(1) / q.value;
    const T ratio = p.value * inverse;
    const Octave<T> octave = octave_of(ratio);
    // rest is exact, and f is too except for its last rounding.
    const T rest = fma(p.value, octave.inverse, -q.value);
    const T rounded = rest * inverse;
    const T f = fma(fma(-rounded, q.value, rest), inverse, rounded);
    T divergence = ratio_divergence(ratio_exponent(p.exponent, q.exponent, octave), f);
    divergence = or_special(divergence, ratio, (input[1] >= T(0)) & (input[3] > T(0)));
    // x = distance + residual / q.value. If the distance is infinite, the residual is taken as 0.
    const T difference = scaled_difference(input[0], input[2], q.factor);
    const T distance = difference * inverse;
    const T remainder = fma(-distance, q.value, difference);
    const T residual = abs(remainder) < Format<T>::kInfinity ? remainder : T(0);
    return fma(distance, fma(residual, inverse, T(0.5) * distance), divergence);
  }

  template <Range range, class T>
  KL_EXT_INLINE static void backward(T grad_output, const T (&input)[kInputs], Settings<T>, T (&gradient)[kGradients]) {
    constexpr int kHalfway = (Format<T>::kBias + 1) / 2;
    // Scaled down by another 2^9, so that gap * p.factor stays in range where p is tiny and q is huge.
    const ScaledDeviation<T> p = scale_deviation<9>(input[1]);
    const ScaledDeviation<T> q = scale_deviation(input[3]);
    const T value_q = q.value > T(0) ? q.value : not_a_number<T>();
    const T gap = ((input[1] >= T(0) ? input[1] : not_a_number<T>()) - input[3]) * q.factor;
    const T distance = scaled_difference(input[0], input[2], q.factor);
    const T inverse_p = T(1) / p.value;
    const T inverse = T(1) / value_q;
    // 1 / value_q^2, as if rounded only once.
    const T error = fma(-inverse, value_q, T(1));
    const T square = inverse * inverse;
    const T inverse_square = square + fma(square, error + error, fma(inverse, inverse, -square));
    // 1 / q^2 = inverse_square * q.factor^2, and 1 / q^3 has one factor more. q.factor = inner * outer; outer is applied last,
    // so that no product overflows before. It is 1 unless q < 2^-kHalfway, and then no product without it is subnormal.
    const T inner = at_most_power_of_two<kHalfway>(q.factor);
    const T outer = at_least_power_of_two<kHalfway>(q.factor) * from_bits<T>(kBitsOfTwoTo<T, -kHalfway>);
    const T by_mean = (distance * inner) * inverse_square;
    const T by_deviation = (gap * inner) * inverse_square;
    const T by_p = fma(gap * p.factor, inverse * inverse_p, by_deviation * outer);
    const T by_q = fma(distance * inverse, by_mean, by_deviation * fma(gap, inverse, T(2)));
    gradient[0] = grad_output * (by_mean * outer);
    gradient[1] = grad_output * by_p;
    gradient[2] = -gradient[0];
    gradient[3] = -grad_output * (by_q * outer);
  }
};

// KL(p||N(0, 1)).
struct StandardNormalDivergence : Formula {
  static constexpr bool kRanges = false;
  static constexpr int kInputs = 2;
  static constexpr int kGradients = 2;

  template <Range range, class T>
  KL_EXT_INLINE static T forward(const T (&input)[kInputs], Settings<T>) {
    const ScaledDeviation<T> p = scale_deviation(input[1]);
    const Octave<T> octave = octave_of(p.value);
    const T f = fma(p.value, octave.inverse, T(-1));
    T divergence = ratio_divergence(ratio_exponent(p.exponent, kBitsOfTwoTo<T, -1>, octave), f);
    divergence = or_special(divergence, p.value, input[1] >= T(0));
    return fma(T(0.5) * input[0], input[0], divergence);
  }

  template <Range range, class T>
  KL_EXT_INLINE static void backward(T grad_output, const T (&input)[kInputs], Settings<T>, T (&gradient)[kGradients]) {
    const T p = input[1] >= T(0) ? input[1] : not_a_number<T>();
    const T inverse = T(1) / p;
    const T rounded = p - inverse;
    // Where the inverse is infinite or 0, there is nothing to correct.
    const T corrected = fma(-inverse, fma(-inverse, p, T(1)), rounded);
    gradient[0] = grad_output * input[0];
    gradient[1] = grad_output * (corrected == corrected ? corrected : rounded);
  }
};

} // namespace kl_ext::math
