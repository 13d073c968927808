// The divergence of two Gaussians from their standard deviations p and q, and its derivatives, per element: the only home of
// these formulas. With D = mu_p - mu_q, r = p / q = 2^k (1 + f) where 3/4 <= 1 + f <= 3/2, and x = D / q, in nats:
//
//   KL = ((r^2 - 1) / 2 - ln r) + x^2 / 2
//      = [(4^k - 1) / 2 - k ln 2] + (4^k - 1) f + f^2 ((4^k + 1) / 2 + f Q(f)) + x^2 / 2
//   dKL/dmu_p = D / q^2 = -dKL/dmu_q
//   dKL/dp    = (p - q)(p + q) / (p q^2) = (p - q) / q^2 + (p - q) / (p q)
//   dKL/dq    = -[D^2 / q^3 + (p - q) / q^2 ((p - q) / q + 2)]
//
// Next to p = q, k is 0, f is exactly what p - q makes it, and everything but the last two terms is exactly 0. Against N(0, 1):
// mu_q = 0, q = 1. Error bounds, for finite means and positive finite deviations, subnormal ones too, in ulps of the result
// (largest found, float and double):
//
//   KL                             4.5 (TODO)
//   gradients of means             4.5 (TODO)
//   gradient of p                  4.5 (TODO)
//   gradient of q                  9 (TODO) of the larger of its two terms
//   against N(0, 1): KL            3 (TODO)
//   against N(0, 1): gradient      1.5 (TODO)
//
// never negative, exactly 0 where p = q, infinite only where the value itself overflows: r, r^2, D, x^2 or 1 / q^2 may be beyond
// the exponents where the result is not. Nothing is clamped, and deviations are known to nobody before the call, so that there is
// one range: a faster one for the usual numbers would have to be chosen by a number's neighbours, on which its bits would then
// depend.
//
// NaN propagates. A deviation that is negative or NaN makes the value and the gradients of deviations NaN, a q of 0 all of them. A
// p of 0 or an infinite q makes the value infinite, an infinite p makes it NaN, as the plain formula does; an infinite difference
// of means makes it infinite too, unless q is infinite. The gradient of a p of 0 is -inf. An infinite q makes every gradient NaN,
// an infinite p that of p NaN and that of q -inf; against N(0, 1), that of an infinite p is inf.
#pragma once

#include "gaussian.h"

namespace kl_ext::math {

// Q of f - log1p f = f^2 (1/2 + f Q(f)), minimax for f from -1/4 to 1/2. q<power>(f, f^2) is 2^power Q(f).
template <class T>
struct RatioConstants;

template <>
struct RatioConstants<float> {
  template <int power>
  KL_EXT_INLINE static float q(float f, float square) {
    return polynomial<power, 0>(f, square, -0x1.555556p-2f, 0x1.000050p-2f, -0x1.999954p-3f, 0x1.5524b0p-3f, -0x1.24493ap-3f,
                                0x1.040c14p-3f, -0x1.df2e5ap-4f, 0x1.7a8c48p-4f, -0x1.3f3adcp-5f);
  }
};

template <>
struct RatioConstants<double> {
  template <int power>
  KL_EXT_INLINE static double q(double f, double square) {
    return polynomial<power, 0>(f, square, -0x1.5555555555550p-2, 0x1.0000000000080p-2, -0x1.999999999b577p-3,
                                0x1.5555555541d8fp-3, -0x1.249249233a99fp-3, 0x1.00000006fd832p-3, -0x1.c71c72b8f3fe4p-4,
                                0x1.999998060c069p-4, -0x1.745ceaa850ce3p-4, 0x1.55553814f5cbbp-4, -0x1.3b18164485581p-4,
                                0x1.249d1c5d7639dp-4, -0x1.10dd3729d872ep-4, 0x1.fe14f9cf3466ep-5, -0x1.e2536211141f8p-5,
                                0x1.d81251540cb1fp-5, -0x1.cf10667065cf6p-5, 0x1.8566ca5fddc70p-5, -0x1.bbf92bed1be68p-6,
                                0x1.df92f574f54d0p-8);
  }
};

// The bits of 2^n, for n in the exponent range of normal numbers; of infinity for the n above it.
template <class T, int n>
constexpr typename Format<T>::Bits kBitsOfTwoTo =
    static_cast<typename Format<T>::Bits>(Format<T>::kBias + n) << Format<T>::kMantissaBits;

// A NaN whose lower half is 0, as rounding to bfloat16 asks for.
template <class T>
KL_EXT_INLINE T not_a_number() {
  constexpr typename Format<T>::Bits kInfinity = kBitsOfTwoTo<T, Format<T>::kBias + 1>;
  return from_bits<T>(kInfinity | kInfinity >> 1);
}

// min(x, 2^n) and max(x, 2^n) of a positive x, as integers: of two floating-point selects between constants gcc makes a path for
// each outcome, and computes all that follows, divisions included, on each.
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
  typename Format<T>::Bits exponent; // in the place of an exponent: with another deviation's, the ratio of the two factors
};

// The value is from 1/2 to 1, times 2^-lower; less for subnormal deviations, and up to 2^8 for the largest: of those the factor
// stops falling, so that products of two factors and a difference of deviations are exact, which they would not be where they are
// subnormal. The factor is a power of two for whatever is no positive number, too.
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

// An n for which 2^-n ratio is from 3/4 to 3/2, for |n| < 64; nothing else than two powers of two for 0, infinity and NaN.
template <class T>
struct Octave {
  static constexpr int kBias = 64;

  T inverse;                         // 2^-n
  typename Format<T>::Bits biased_n; // n + kBias
};

template <class T>
KL_EXT_INLINE Octave<T> octave_of(T ratio) {
  using F = Format<T>;
  using Bits = typename F::Bits;
  constexpr Bits kThreeQuarters = kBitsOfTwoTo<T, -1> + (Bits{1} << (F::kMantissaBits - 1));
  constexpr Bits kOctaves = static_cast<Bits>(Octave<T>::kBias) << F::kMantissaBits;
  constexpr Bits kMantissa = (Bits{1} << F::kMantissaBits) - 1;
  const Bits bits = to_bits(ratio) + (kOctaves - kThreeQuarters);
  return {from_bits<T>(kBitsOfTwoTo<T, Octave<T>::kBias> - (bits & ~kMantissa)), bits >> F::kMantissaBits};
}

// k of r = p / q = 2^k (1 + f), and 4^k / 8. Where r^2 overflows, 4^k stays at a size for which the value does, too; where r^2 is
// lost beside 1, at one that is.
template <class T>
struct RatioExponent {
  T k;
  T eighth_square;
};

template <class T>
KL_EXT_INLINE RatioExponent<T> ratio_exponent(typename Format<T>::Bits p, typename Format<T>::Bits q, Octave<T> octave) {
  using F = Format<T>;
  using Bits = typename F::Bits;
  // The difference of two exponents needs a bit more than an exponent has: the sign's.
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

// (r^2 - 1) / 2 - ln r, computed as an eighth of itself, which is finite on the way wherever it is.
template <class T>
KL_EXT_INLINE T ratio_divergence(RatioExponent<T> r, T f) {
  using C = Constants<T>;
  const T slope = r.eighth_square - T(0.125);
  const T square = f * f;
  const T curve = fma(f, RatioConstants<T>::template q<-3>(f, square), fma(T(0.5), r.eighth_square, T(0.0625)));
  const T constant = fma(r.k, T(-0.125) * C::kLn2High, T(0.5) * slope);
  const T linear = fma(r.k, T(-0.125) * C::kLn2Low, fma(slope, f, constant));
  // f curve and not f^2 is what is rounded: its ulp is the smaller where the sum's is smallest, just below f^2 for k = 0.
  return T(8) * fma(f * curve, f, linear);
}

// What stands for the above where p is 0 or q infinite, so that the ratio is 0, and where a deviation is none.
template <class T>
KL_EXT_INLINE T or_special(T divergence, T ratio, bool deviations) {
  const T or_infinite = ratio == T(0) ? Format<T>::kInfinity : divergence;
  return deviations & (ratio < Format<T>::kInfinity) ? or_infinite : not_a_number<T>();
}

// (mu_p - mu_q) factor, in two steps: neither a difference that overflows nor one that is subnormal is on the way.
template <class T>
KL_EXT_INLINE T scaled_difference(T mu_p, T mu_q, T factor) {
  const T down = at_most_power_of_two<0>(factor);
  return fma(mu_p, down, -(mu_q * down)) * at_least_power_of_two<0>(factor);
}

// The losses, for kernels of any kind: inputs in the order of the operators' arguments. Neither range nor bounds mean anything.

struct NormalDivergence {
  static constexpr int kInputs = 4;
  static constexpr int kGradients = 4;

  template <Range range, class T>
  KL_EXT_INLINE static T forward(const T (&input)[kInputs], Clamp<T>) {
    const ScaledDeviation<T> p = scale_deviation(input[1]);
    const ScaledDeviation<T> q = scale_deviation(input[3]);
    const T inverse = T(1) / q.value;
    const T ratio = p.value * inverse;
    const Octave<T> octave = octave_of(ratio);
    // Exact, and so f is but for its last rounding.
    const T rest = fma(p.value, octave.inverse, -q.value);
    const T rounded = rest * inverse;
    const T f = fma(fma(-rounded, q.value, rest), inverse, rounded);
    T divergence = ratio_divergence(ratio_exponent(p.exponent, q.exponent, octave), f);
    divergence = or_special(divergence, ratio, (input[1] >= T(0)) & (input[3] > T(0)));
    // x = shift + residual / q.value. Of an infinite shift there is no residual.
    const T difference = scaled_difference(input[0], input[2], q.factor);
    const T shift = difference * inverse;
    const T remainder = fma(-shift, q.value, difference);
    const T residual = abs(remainder) < Format<T>::kInfinity ? remainder : T(0);
    return fma(shift, fma(residual, inverse, T(0.5) * shift), divergence);
  }

  template <Range range, class T>
  KL_EXT_INLINE static void backward(T grad_output, const T (&input)[kInputs], Clamp<T>, T (&gradient)[kGradients]) {
    constexpr int kHalfway = (Format<T>::kBias + 1) / 2;
    // (p - q) factor_p stays in range by 9 powers of two less, where p is tiny and q huge.
    const ScaledDeviation<T> p = scale_deviation<9>(input[1]);
    const ScaledDeviation<T> q = scale_deviation(input[3]);
    const T value_q = q.value > T(0) ? q.value : not_a_number<T>();
    const T shift = ((input[1] >= T(0) ? input[1] : not_a_number<T>()) - input[3]) * q.factor;
    const T mean_shift = scaled_difference(input[0], input[2], q.factor);
    const T inverse_p = T(1) / p.value;
    const T inverse = T(1) / value_q;
    // 1 / value_q^2, rounded as if but once.
    const T error = fma(-inverse, value_q, T(1));
    const T square = inverse * inverse;
    const T inverse_square = square + fma(square, error + error, fma(inverse, inverse, -square));
    // 1 / q^2 = inverse_square * factor_q^2, and 1 / q^3 has one factor more: the inner factor is used before the terms are added,
    // the outer one afterwards. It is 1 but for the smallest q, of which no term is subnormal without it.
    const T inner = at_most_power_of_two<kHalfway>(q.factor);
    const T outer = at_least_power_of_two<kHalfway>(q.factor) * from_bits<T>(kBitsOfTwoTo<T, -kHalfway>);
    const T by_mean = (mean_shift * inner) * inverse_square;
    const T by_deviation = (shift * inner) * inverse_square;
    const T by_p = fma(shift * p.factor, inverse * inverse_p, by_deviation * outer);
    const T by_q = fma(mean_shift * inverse, by_mean, by_deviation * fma(shift, inverse, T(2)));
    gradient[0] = grad_output * (by_mean * outer);
    gradient[1] = grad_output * by_p;
    gradient[2] = -gradient[0];
    gradient[3] = -grad_output * (by_q * outer);
  }
};

// KL(p||N(0, 1)).
struct StandardNormalDivergence {
  static constexpr int kInputs = 2;
  static constexpr int kGradients = 2;

  template <Range range, class T>
  KL_EXT_INLINE static T forward(const T (&input)[kInputs], Clamp<T>) {
    const ScaledDeviation<T> p = scale_deviation(input[1]);
    const Octave<T> octave = octave_of(p.value);
    const T f = fma(p.value, octave.inverse, T(-1));
    T divergence = ratio_divergence(ratio_exponent(p.exponent, kBitsOfTwoTo<T, -1>, octave), f);
    divergence = or_special(divergence, p.value, input[1] >= T(0));
    return fma(T(0.5) * input[0], input[0], divergence);
  }

  template <Range range, class T>
  KL_EXT_INLINE static void backward(T grad_output, const T (&input)[kInputs], Clamp<T>, T (&gradient)[kGradients]) {
    const T p = input[1] >= T(0) ? input[1] : not_a_number<T>();
    const T inverse = T(1) / p;
    const T rounded = p - inverse;
    // Where the inverse is infinite or 0, there is no error of it.
    const T corrected = fma(-inverse, fma(-inverse, p, T(1)), rounded);
    gradient[0] = grad_output * input[0];
    gradient[1] = grad_output * (corrected == corrected ? corrected : rounded);
  }
};

} // namespace kl_ext::math
