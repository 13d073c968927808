// The list of the formulas that have kernels, for every backend, and their weighted forms.
#pragma once

#include <type_traits>

#include "gaussian.h"
#include "normal.h"

namespace kl_ext::math {

// The first inputs, which belong to the formula itself; a weight may follow them.
template <class F, class T>
struct OwnInputs {
  T values[F::kInputs];

  KL_EXT_INLINE explicit OwnInputs(const T* input) {
    for (int i = 0; i < F::kInputs; ++i) {
      values[i] = input[i];
    }
  }
};

// weight * term, with the weight as the last input. Where it is 0 the term is left out: the term and its gradients are +0,
// whatever the inputs are.
template <class F>
struct Weighted {
  static constexpr int kInputs = F::kInputs + 1;
  static constexpr int kGradients = F::kGradients;
  static constexpr bool kRanges = F::kRanges;
  static constexpr bool kIsWeighted = true;
  static constexpr bool kIsMasked = false;
  using GivenQ = std::conditional_t<std::is_void_v<typename F::GivenQ>, void, Weighted<typename F::GivenQ>>;

  template <class T>
  KL_EXT_INLINE static T result(T term, Settings<T> settings) {
    return F::result(term, settings);
  }

  template <Range range, class T>
  KL_EXT_INLINE static T forward(const T (&input)[kInputs], Settings<T> settings) {
    const T weight = input[F::kInputs];
    const T term = weight * F::template forward<range>(OwnInputs<F, T>(input).values, settings);
    return weight == T(0) ? T(0) : term;
  }

  template <Range range, class T>
  KL_EXT_INLINE static void backward(T grad_output, const T (&input)[kInputs], Settings<T> settings,
                                     T (&gradient)[kGradients]) {
    const T weight = input[F::kInputs];
    F::template backward<range>(weight * grad_output, OwnInputs<F, T>(input).values, settings, gradient);
    for (int i = 0; i < kGradients; ++i) {
      gradient[i] = weight == T(0) ? T(0) : gradient[i];
    }
  }
};

// Weighted where every weight is 0 or 1, for kernels that read bools.
template <class F>
struct Masked : Weighted<F> {
  static constexpr bool kIsMasked = true;
  using GivenQ = std::conditional_t<std::is_void_v<typename F::GivenQ>, void, Masked<typename F::GivenQ>>;

  template <Range range, class T>
  KL_EXT_INLINE static T forward(const T (&input)[Weighted<F>::kInputs], Settings<T> settings) {
    const T term = F::template forward<range>(OwnInputs<F, T>(input).values, settings);
    return input[F::kInputs] == T(0) ? T(0) : term;
  }
};

// A weight as a term, for the sum of weights that divides a weighted mean.
struct Weight : Formula {
  static constexpr int kInputs = 1;
  static constexpr int kGradients = 0;
  static constexpr bool kRanges = false;
  static constexpr bool kIsWeighted = true;

  template <Range, class T>
  KL_EXT_INLINE static T forward(const T (&input)[kInputs], Settings<T>) {
    return input[0];
  }
};

template <class... F>
struct FormulaList {
  static constexpr int kCount = sizeof...(F);

  template <class Wanted>
  static constexpr int index_of() {
    static_assert((std::is_same_v<F, Wanted> || ...), "this formula is not in the list of math/formulas.h");
    int index = 0;
    (void)((std::is_same_v<F, Wanted> || (++index, false)) || ...);
    return index;
  }
};

using Formulas = FormulaList<StandardDivergence, Divergence, StandardNormalDivergence, NormalDivergence>;

// The index of a formula, for code that does not know its type.
template <class F>
constexpr int kFormula = Formulas::index_of<F>();

// Weight is a formula too; its index follows those in the list.
template <>
inline constexpr int kFormula<Weight> = Formulas::kCount;

} // namespace kl_ext::math
