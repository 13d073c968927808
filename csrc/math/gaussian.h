// The divergences of two Gaussians and their derivatives, per element: the only home of the formulas. With lp, lq the clamped
// log-variances, d = lp - lq, D = mu_p - mu_q and w = e^-lq, in nats:
//
//   KL(p||q) = half_phi(d) + D (D w) / 2
//   dKL/dmu_p = D w = -dKL/dmu_q      dKL/dlp = expm1(d) / 2      dKL/dlq = -(expm1(d) + D^2 w) / 2
//
// Against N(0, 1): mu_q = 0, lq = 0. Error bounds, for finite inputs, in ulps of the result (largest found in brackets):
//
//   single                         2.5 (2.3)
//   KL, documented pair            4.5 (3.9)
//   gradients                      3 (2.5)
//   the gradient of log_var_q      6 (5.3) of the larger of its two terms
//
// never negative, exactly 0 where p = q, infinite only where the value itself overflows. Infinite inputs give what the plain
// formulas give, and NaN propagates.
#pragma once

#include "exponential.h"

namespace kl_ext::math {

// NaN stays. Of two zeros it may be either, on which no divergence and no gradient depends.
template <class T>
KL_EXT_INLINE T clamp(T x, T low, T high) {
  return at_most(at_least(x, low), high);
}

// What torch.clamp does to the gradient of its input: the bounds themselves pass, NaN does not.
template <class T>
KL_EXT_INLINE T clamp_gradient(T gradient, T x, T low, T high) {
  return is_within(x, low, high) ? gradient : T(0);
}

template <class T>
KL_EXT_INLINE bool is_infinite(T x) {
  return abs(x) == Format<T>::kInfinity;
}

template <class T>
struct Clamp {
  T low;
  T high;
};

// x = significand * 2^exponent with 1 <= |significand| < 2; zeros, infinities and NaN stay as they are.
template <class T>
struct Scientific {
  T significand;
  T exponent;
};

template <class T>
KL_EXT_INLINE Scientific<T> to_scientific(T x) {
  using F = Format<T>;
  using Bits = typename F::Bits;
  constexpr Bits kExponentField = static_cast<Bits>(2 * F::kBias + 1) << F::kMantissaBits;
  constexpr Bits kExponentOfOne = static_cast<Bits>(F::kBias) << F::kMantissaBits;
  constexpr T kSubnormalScale = static_cast<T>(Bits{2} << F::kMantissaBits);
  constexpr T kInteger = static_cast<T>(Bits{1} << F::kMantissaBits);
  const bool subnormal = (to_bits(x) & kExponentField) == 0;
  const Bits bits = to_bits(subnormal ? x * kSubnormalScale : x);
  const T biased = from_bits<T>(to_bits(kInteger) + ((bits & kExponentField) >> F::kMantissaBits)) - kInteger;
  const T exponent = biased - T(F::kBias) - (subnormal ? T(F::kMantissaBits + 1) : T(0));
  const bool regular = ((to_bits(x) & kExponentField) != kExponentField) & (x != T(0));
  return {regular ? from_bits<T>((bits & ~kExponentField) | kExponentOfOne) : x, regular ? exponent : T(0)};
}

// A product that is rounded but once: alone, or with what is added to it. Either factor is in range wherever the product is.
template <class T>
struct Product {
  T left;
  T right;

  KL_EXT_INLINE T value() const { return left * right; }
  KL_EXT_INLINE T plus(T x) const { return fma(left, right, x); }
};

// x * 2^n for factors from 1/16 to 16 and any integral n.
template <class T>
KL_EXT_INLINE Product<T> scale_by_power_of_two(Product<T> x, T n) {
  using F = Format<T>;
  n = clamp(n, T(-F::kBias - F::kMantissaBits - 8), T(F::kBias + 5));
  const T half = trunc(T(0.5) * n);
  return {x.left * power_of_two(half + kShift<T>), x.right * power_of_two(n - half + kShift<T>)};
}

// 2^power w = 2^power e^-log_var_q, in the narrow range.
template <int power, class T>
KL_EXT_INLINE T inverse_variance(T log_var_q) {
  const Reduced<T> x = reduce_to_nearest(-log_var_q);
  const T scale = power_of_two<power>(x.shifted_k);
  return fma(scale, expm1_reduced(x.r), scale);
}

// D^2 w in the narrow range, of w or half of it. It is infinite where D is.
template <class T>
KL_EXT_INLINE Product<T> square_over(T mu_p, T mu_q, T inverse_var) {
  const T difference = mu_p - mu_q;
  return {difference, difference * inverse_var};
}

// For the gradients: kTimes D w and kTimes D^2 w / 2. Doubling D w afterwards would double the rounding of one that is
// subnormal.
template <class T>
struct Shift {
  T scaled;
  Product<T> half_square;
};

// inverse_var: kTimes w.
template <class T>
KL_EXT_INLINE Shift<T> shift_over(T mu_p, T mu_q, T inverse_var) {
  const T difference = mu_p - mu_q;
  const bool overflow = is_infinite(difference);
  const T without_overflow = fma(T(-0.5), mu_q, T(0.5) * mu_p);
  const T scaled = (overflow ? without_overflow : difference) * (overflow ? inverse_var + inverse_var : inverse_var);
  return {scaled, {T(0.5) * difference, scaled}};
}

template <Range range, int kTimes = 1, class T>
KL_EXT_INLINE Shift<T> shift(T mu_p, T mu_q, T log_var_q) {
  if constexpr (range == Range::kNarrow) {
    return shift_over(mu_p, mu_q, inverse_variance<kTimes - 1>(log_var_q));
  } else {
    const T difference = mu_p - mu_q;
    // Significands and exponents apart. Beyond kFar no difference of means brings the product back into range.
    constexpr T kFar = T(2.5) * T(Format<T>::kBias + Format<T>::kMantissaBits);
    const Reduced<T> x = reduce_to_nearest(clamp(-log_var_q, -kFar, kFar));
    T inverse_var = T(1) + expm1_reduced(x.r);
    inverse_var = log_var_q == Format<T>::kInfinity ? T(0) : inverse_var;
    inverse_var = log_var_q == -Format<T>::kInfinity ? Format<T>::kInfinity : inverse_var;
    const bool overflow = is_infinite(difference);
    const Scientific<T> mean = to_scientific(overflow ? T(0.5) * mu_p - T(0.5) * mu_q : difference);
    const T k = x.shifted_k - kShift<T>;
    const T exponent = mean.exponent + (overflow ? T(1) : T(0));
    const T scaled = (T(kTimes) * mean.significand) * inverse_var;
    return {scale_by_power_of_two<T>({scaled, T(1)}, k + exponent).value(),
            scale_by_power_of_two<T>({T(0.5) * mean.significand, scaled}, k + T(2) * exponent)};
  }
}

template <Range range, int kTimes, class T>
KL_EXT_INLINE Product<T> half_square(T mu_p, T mu_q, T log_var_q) {
  if constexpr (range == Range::kNarrow) {
    return square_over(mu_p, mu_q, inverse_variance<kTimes - 2>(log_var_q));
  } else {
    return shift<range, kTimes>(mu_p, mu_q, log_var_q).half_square;
  }
}

// The difference of two log-variances, or of 2^-step times both, with its rounding error folded into the reduction: without it
// the divergence of two distributions that nearly agree is off by 33 ulp, with it by 4.
template <class T>
struct Difference {
  T rounded;
  Reduced<T> reduced;
};

template <Range range, int step = 0, For purpose = For::kPhi, class T>
KL_EXT_INLINE Difference<T> subtract(T p, T q) {
  const T difference = p - q;
  const T minus_q = difference - p;
  T error = (p - (difference - minus_q)) - (q + minus_q);
  if constexpr (range == Range::kWide) {
    error = error == error ? error : T(0); // NaN where something overflows, be it but on the way
  }
  return {difference, reduce<range, step, purpose>(difference, error)};
}

// KL(p||q) but for the means.
template <Range range, class T>
KL_EXT_INLINE T variances_divergence(T log_var_p, T log_var_q) {
  const Difference<T> half = subtract<range, 1>(T(0.5) * log_var_p, T(0.5) * log_var_q);
  return half_phi<range, Argument::kNumberWithError>(half.rounded, half.reduced);
}

// KL(p||N(0, 1)).
template <Range range, class T>
KL_EXT_INLINE T divergence(T mu, T log_var) {
  const T half_log_var = T(0.5) * log_var;
  const T variance = half_phi<range, Argument::kNumber>(half_log_var, reduce<range, 1>(half_log_var));
  return fma(T(0.5) * mu, mu, variance);
}

// The losses, for kernels of any kind: inputs in the order of the operators' arguments, log-variances not yet clamped.

struct SingleLoss {
  static constexpr int kInputs = 2;
  static constexpr int kGradients = 2;

  template <Range range, class T>
  KL_EXT_INLINE static T forward(const T (&input)[kInputs], Clamp<T> bounds) {
    return divergence<range>(input[0], clamp(input[1], bounds.low, bounds.high));
  }

  template <Range range, class T>
  KL_EXT_INLINE static void backward(T grad_output, const T (&input)[kInputs], Clamp<T> bounds, T (&gradient)[kInputs]) {
    const T log_var = clamp(input[1], bounds.low, bounds.high);
    gradient[0] = grad_output * input[0];
    gradient[1] = grad_output * half_expm1<range>(reduce<range, 0, For::kExpm1>(log_var));
    gradient[1] = clamp_gradient(gradient[1], input[1], bounds.low, bounds.high);
  }
};

// KL(p||q), or, as documented for the pair loss, log(var_q / var_p) + (var_p + D^2) / var_q - 1/2 = 2 KL(p||q) + 1/2.
template <bool documented>
struct PairOf {
  static constexpr int kInputs = 4;
  static constexpr int kGradients = 4;
  static constexpr int kTimes = documented ? 2 : 1;
  // Values and ratios of variances are doubled as they are computed; in the wide range, where that overflows on the way,
  // afterwards.
  template <Range range>
  static constexpr int kTimesOf = range == Range::kNarrow ? kTimes : 1;

  template <Range range, class T>
  KL_EXT_INLINE static T forward(const T (&input)[kInputs], Clamp<T> bounds) {
    const T log_var_q = clamp(input[3], bounds.low, bounds.high);
    return value<range>(input, bounds, [&] { return half_square<range, kTimesOf<range>>(input[0], input[2], log_var_q); });
  }

  template <Range range, class T>
  KL_EXT_INLINE static void backward(T grad_output, const T (&input)[kInputs], Clamp<T> bounds, T (&gradient)[kGradients]) {
    const T log_var_q = clamp(input[3], bounds.low, bounds.high);
    gradients<range>(grad_output, input, bounds, [&] { return shift<range, kTimes>(input[0], input[2], log_var_q); }, gradient);
  }

  template <Range range, class T, class Means>
  KL_EXT_INLINE static T value(const T* input, Clamp<T> bounds, const Means& means) {
    const T log_var_p = clamp(input[1], bounds.low, bounds.high);
    const T log_var_q = clamp(input[3], bounds.low, bounds.high);
    if constexpr (kTimesOf<range> == 2) {
      const Difference<T> difference = subtract<range>(log_var_p, log_var_q);
      return means().plus(phi(difference.rounded, difference.reduced)) + T(0.5);
    } else {
      const T value = means().plus(variances_divergence<range>(log_var_p, log_var_q));
      return documented ? fma(T(2), value, T(0.5)) : value;
    }
  }

  template <Range range, class T, class Means>
  KL_EXT_INLINE static void gradients(T grad_output, const T* input, Clamp<T> bounds, const Means& means,
                                      T (&gradient)[kGradients]) {
    const T log_var_p = clamp(input[1], bounds.low, bounds.high);
    const T log_var_q = clamp(input[3], bounds.low, bounds.high);
    const Reduced<T> difference = subtract<range, 0, For::kExpm1>(log_var_p, log_var_q).reduced;
    const T half_ratio = T(kTimes / kTimesOf<range>) * half_expm1<range, kTimesOf<range>>(difference);
    const Shift<T> shift = means();
    gradient[0] = grad_output * shift.scaled;
    gradient[1] = clamp_gradient(grad_output * half_ratio, input[1], bounds.low, bounds.high);
    gradient[2] = -gradient[0];
    gradient[3] = -grad_output * shift.half_square.plus(half_ratio);
    gradient[3] = clamp_gradient(gradient[3], input[3], bounds.low, bounds.high);
  }
};

// The same where q is shared by many p: the last input is what only q decides, inverse_variance of its clamped log-variance
// with the power that the direction has. In the narrow range.
template <bool documented>
struct PairGivenQ {
  static constexpr int kInputs = 5;
  static constexpr int kGradients = 4;
  using Pair = PairOf<documented>;
  static constexpr int kForwardPower = Pair::kTimes - 2;
  static constexpr int kBackwardPower = Pair::kTimes - 1;

  template <Range range, class T>
  KL_EXT_INLINE static T forward(const T (&input)[kInputs], Clamp<T> bounds) {
    static_assert(range == Range::kNarrow);
    return Pair::template value<range>(input, bounds, [&] { return square_over(input[0], input[2], input[4]); });
  }

  template <Range range, class T>
  KL_EXT_INLINE static void backward(T grad_output, const T (&input)[kInputs], Clamp<T> bounds, T (&gradient)[kGradients]) {
    static_assert(range == Range::kNarrow);
    const auto means = [&] { return shift_over(input[0], input[2], input[4]); };
    Pair::template gradients<range>(grad_output, input, bounds, means, gradient);
  }
};

using PairLoss = PairOf<true>;
using Divergence = PairOf<false>;

} // namespace kl_ext::math
