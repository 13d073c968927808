// The divergences of two Gaussians and their derivatives, per element, in nats. No other file has these formulas. With lp, lq
// the clamped log-variances, d = lp - lq, D = mu_p - mu_q and w = e^-lq:
//
//   KL(p||q) = half_phi(d) + D (D w) / 2
//   dKL/dmu_p = D w = -dKL/dmu_q      dKL/dlp = expm1(d) / 2      dKL/dlq = -(expm1(d) + D^2 w) / 2
//
// Against N(0, 1): mu_q = 0, lq = 0. Error bounds, for finite inputs, in ulps of the result (largest found in brackets):
//
//   against N(0, 1)                2.5 (2.3)
//   KL, documented pair            4.5 (4.3)
//   gradients                      3 (2.9)
//   the gradient of log_var_q      6 (5.6) of the larger of its two terms
//
// Values are never negative, exactly 0 where p = q, and infinite only where the true value overflows. Infinite inputs give what
// the plain formulas give, and NaN propagates.
#pragma once

#include "exponential.h"

namespace kl_ext::math {

// NaN stays. If x and a bound are zeros, the result may be either; no divergence or gradient depends on which.
template <class T>
KL_EXT_INLINE T clamp(T x, T low, T high) {
  return at_most(at_least(x, low), high);
}

// The gradient of torch.clamp: at the bounds themselves it passes, at NaN it does not.
template <class T>
KL_EXT_INLINE T clamp_gradient(T gradient, T x, T low, T high) {
  return is_within(x, low, high) ? gradient : T(0);
}

template <class T>
KL_EXT_INLINE bool is_infinite(T x) {
  return abs(x) == Format<T>::kInfinity;
}

// The settings of a call: the clamp of the log-variances, and the result scale KL + offset. The documented loss of a pair is
// 2 KL + 1/2; everything else is KL itself.
template <class T>
struct Settings {
  T low;
  T high;
  T scale = T(1); // 1 or 2
  T offset = T(0);
};

// x = significand * 2^exponent with 1 <= |significand| < 2; zeros, infinities and NaN stay as they are.
template <class T>
struct Scientific {
  T significand;
  T exponent;

  KL_EXT_APART(Scientific)
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

// A product that is rounded only once: alone, or together with an addend. Where the product is in range, so are its factors.
template <class T>
struct Product {
  T left;
  T right;

  KL_EXT_INLINE T value() const { return left * right; }
  KL_EXT_INLINE T plus(T x) const { return fma(left, right, x); }

  KL_EXT_APART(Product)
};

// x * 2^n for factors from 1/16 to 16 and any integral n.
template <class T>
KL_EXT_INLINE Product<T> scale_by_power_of_two(Product<T> x, T n) {
  using F = Format<T>;
  n = clamp(n, T(-F::kBias - F::kMantissaBits - 8), T(F::kBias + 5));
  const T half = trunc(T(0.5) * n);
  return {x.left * power_of_two(half + kShift<T>), x.right * power_of_two(n - half + kShift<T>)};
}

// w = e^-log_var_q, or half of it, in the narrow range.
template <bool half, class T>
KL_EXT_INLINE T inverse_variance(T log_var_q) {
  const Split<T> x = split_at_nearest(-log_var_q);
  const T scale = power_of_two<half ? -1 : 0>(x.shifted_k);
  return fma(scale, expm1_of_rest(x.r), scale);
}

// D^2 w / 2 in the narrow range, from half of w. It is infinite where D is.
template <class T>
KL_EXT_INLINE Product<T> half_square_over(T mu_p, T mu_q, T half_inverse_var) {
  const T difference = mu_p - mu_q;
  return {difference, difference * half_inverse_var};
}

// For the gradients: scale D w and scale D^2 w / 2. Doubling D w afterwards would double the rounding error if it is subnormal.
template <class T>
struct MeanGradient {
  T of_mean;
  Product<T> of_log_var;

  KL_EXT_APART(MeanGradient)
};

// inverse_var: scale w.
template <class T>
KL_EXT_INLINE MeanGradient<T> mean_gradient_over(T mu_p, T mu_q, T inverse_var) {
  const T difference = mu_p - mu_q;
  const bool overflow = is_infinite(difference);
  const T without_overflow = fma(T(-0.5), mu_q, T(0.5) * mu_p);
  const T scaled = (overflow ? without_overflow : difference) * (overflow ? inverse_var + inverse_var : inverse_var);
  return {scaled, {T(0.5) * difference, scaled}};
}

template <Range range, class T>
KL_EXT_INLINE MeanGradient<T> mean_gradient(T mu_p, T mu_q, T log_var_q, T scale) {
  if constexpr (range == Range::kNarrow) {
    return mean_gradient_over(mu_p, mu_q, scale * inverse_variance<false>(log_var_q));
  } else {
    const T difference = mu_p - mu_q;
    // Significands and exponents are kept apart. Beyond kFar no difference of means brings the product back into range.
    constexpr T kFar = T(2.5) * T(Format<T>::kBias + Format<T>::kMantissaBits);
    const Split<T> x = split_at_nearest(clamp(-log_var_q, -kFar, kFar));
    T inverse_var = T(1) + expm1_of_rest(x.r);
    inverse_var = log_var_q == Format<T>::kInfinity ? T(0) : inverse_var;
    inverse_var = log_var_q == -Format<T>::kInfinity ? Format<T>::kInfinity : inverse_var;
    const bool overflow = is_infinite(difference);
    const Scientific<T> mean = to_scientific(overflow ? T(0.5) * mu_p - T(0.5) * mu_q : difference);
    const T k = x.shifted_k - kShift<T>;
    const T exponent = mean.exponent + (overflow ? T(1) : T(0));
    const T scaled = (scale * mean.significand) * inverse_var;
    return {scale_by_power_of_two<T>({scaled, T(1)}, k + exponent).value(),
            scale_by_power_of_two<T>({T(0.5) * mean.significand, scaled}, k + T(2) * exponent)};
  }
}

// D^2 w / 2.
template <Range range, class T>
KL_EXT_INLINE Product<T> half_square(T mu_p, T mu_q, T log_var_q) {
  if constexpr (range == Range::kNarrow) {
    return half_square_over(mu_p, mu_q, inverse_variance<true>(log_var_q));
  } else {
    return mean_gradient<range>(mu_p, mu_q, log_var_q, T(1)).of_log_var;
  }
}

// The difference of two log-variances, or of 2^-step times both, with its rounding error folded into the reduction: without the
// error, the divergence of two distributions that nearly agree is off by 33 ulp, with it by 4.
template <class T>
struct Difference {
  T rounded;
  Split<T> split;

  KL_EXT_APART(Difference)
};

template <Range range, int step = 0, Use use = Use::kPhi, class T>
KL_EXT_INLINE Difference<T> subtract(T p, T q) {
  const T difference = p - q;
  const T minus_q = difference - p;
  T error = (p - (difference - minus_q)) - (q + minus_q);
  if constexpr (range == Range::kWide) {
    error = error == error ? error : T(0); // NaN where an intermediate result overflows
  }
  return {difference, split<range, step, use>(difference, error)};
}

// The formulas, for all kernels: inputs in the order of the operators' arguments, log-variances not yet clamped. Each has
//
//   kInputs, kGradients                     the number of inputs, and of gradients: those of the first inputs
//   kRanges                                 whether a clamp may make the narrow range enough
//   kIsWeighted                             whether the last input is a weight, which may be a bool
//   kIsMasked                               whether that weight is always a bool
//   GivenQ                                  the formula with one more input, precomputed from q alone; void if there is none
//   forward<range>(input, settings)         the divergence
//   result(divergence, settings)            what an elementwise operator returns for it
//   backward<range>(grad_output, input, settings, gradient)      the gradients of the result

struct Formula {
  static constexpr bool kRanges = true;
  static constexpr bool kIsWeighted = false;
  static constexpr bool kIsMasked = false;
  using GivenQ = void;

  template <class T>
  KL_EXT_INLINE static T result(T divergence, Settings<T>) {
    return divergence;
  }
};

// KL(p||N(0, 1)).
struct StandardDivergence : Formula {
  static constexpr int kInputs = 2;
  static constexpr int kGradients = 2;

  template <Range range, class T>
  KL_EXT_INLINE static T forward(const T (&input)[kInputs], Settings<T> settings) {
    const T half_log_var = T(0.5) * clamp(input[1], settings.low, settings.high);
    const T variance = half_phi<range, Exactness::kExact>(half_log_var, split<range, 1>(half_log_var));
    return fma(T(0.5) * input[0], input[0], variance);
  }

  template <Range range, class T>
  KL_EXT_INLINE static void backward(T grad_output, const T (&input)[kInputs], Settings<T> settings, T (&gradient)[kInputs]) {
    const T log_var = clamp(input[1], settings.low, settings.high);
    gradient[0] = grad_output * input[0];
    gradient[1] = grad_output * half_expm1<range>(split<range, 0, Use::kExpm1>(log_var));
    gradient[1] = clamp_gradient(gradient[1], input[1], settings.low, settings.high);
  }
};

struct DivergenceGivenQ;

// KL(p||q).
struct Divergence : Formula {
  using GivenQ = DivergenceGivenQ;
  static constexpr int kInputs = 4;
  static constexpr int kGradients = 4;

  template <Range range, class T>
  KL_EXT_INLINE static T forward(const T (&input)[kInputs], Settings<T> settings) {
    const T log_var_q = clamp(input[3], settings.low, settings.high);
    return value<range>(input, settings, half_square<range>(input[0], input[2], log_var_q));
  }

  template <class T>
  KL_EXT_INLINE static T result(T divergence, Settings<T> settings) {
    return fma(settings.scale, divergence, settings.offset);
  }

  template <Range range, class T>
  KL_EXT_INLINE static void backward(T grad_output, const T (&input)[kInputs], Settings<T> settings,
                                     T (&gradient)[kGradients]) {
    const T log_var_q = clamp(input[3], settings.low, settings.high);
    const auto means = mean_gradient<range>(input[0], input[2], log_var_q, settings.scale);
    gradients<range>(grad_output, input, settings, means, gradient);
  }

  // half_square: D^2 w / 2.
  template <Range range, class T>
  KL_EXT_INLINE static T value(const T* input, Settings<T> settings, Product<T> half_square) {
    const T log_var_p = clamp(input[1], settings.low, settings.high);
    const T log_var_q = clamp(input[3], settings.low, settings.high);
    const Difference<T> half = subtract<range, 1>(T(0.5) * log_var_p, T(0.5) * log_var_q);
    return half_square.plus(half_phi<range, Exactness::kWithError>(half.rounded, half.split));
  }

  template <Range range, class T>
  KL_EXT_INLINE static void gradients(T grad_output, const T* input, Settings<T> settings, MeanGradient<T> means,
                                      T (&gradient)[kGradients]) {
    const T log_var_p = clamp(input[1], settings.low, settings.high);
    const T log_var_q = clamp(input[3], settings.low, settings.high);
    const Split<T> difference = subtract<range, 0, Use::kExpm1>(log_var_p, log_var_q).split;
    const T half_ratio = settings.scale * half_expm1<range>(difference);
    gradient[0] = grad_output * means.of_mean;
    gradient[1] = clamp_gradient(grad_output * half_ratio, input[1], settings.low, settings.high);
    gradient[2] = -gradient[0];
    gradient[3] = -grad_output * means.of_log_var.plus(half_ratio);
    gradient[3] = clamp_gradient(gradient[3], input[3], settings.low, settings.high);
  }
};

// Divergence where many p share q: the last input is prepared<forward>(log_var_q), which depends on q alone. Narrow range only.
struct DivergenceGivenQ : Divergence {
  static constexpr int kInputs = 5;

  template <bool forward, class T>
  KL_EXT_INLINE static T prepared(T log_var_q, Settings<T> settings) {
    const T clamped = clamp(log_var_q, settings.low, settings.high);
    return forward ? inverse_variance<true>(clamped) : settings.scale * inverse_variance<false>(clamped);
  }

  template <Range range, class T>
  KL_EXT_INLINE static T forward(const T (&input)[kInputs], Settings<T> settings) {
    static_assert(range == Range::kNarrow);
    return value<range>(input, settings, half_square_over(input[0], input[2], input[4]));
  }

  template <Range range, class T>
  KL_EXT_INLINE static void backward(T grad_output, const T (&input)[kInputs], Settings<T> settings,
                                     T (&gradient)[kGradients]) {
    static_assert(range == Range::kNarrow);
    gradients<range>(grad_output, input, settings, mean_gradient_over(input[0], input[2], input[4]), gradient);
  }
};

} // namespace kl_ext::math
