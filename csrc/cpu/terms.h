// The inputs that the loops of the formulas read, and the terms computed from them.
#pragma once

#include <type_traits>

#include "../math/gaussian.h"
#include "groups.h"
#include "kernels.h"

namespace kl_ext::cpu::KL_EXT_CPU_CAPABILITY {
namespace {

using math::Range;

template <class T>
math::Settings<T> to_settings(Settings given) {
  return {static_cast<T>(given.low), static_cast<T>(given.high), static_cast<T>(given.scale), static_cast<T>(given.offset)};
}

// A row of an operand.
template <class S>
KL_EXT_INLINE S* row_of(const Block& block, int operand, std::int64_t row) {
  return reinterpret_cast<S*>(static_cast<char*>(block.pointers[operand]) + row * block.row_strides[operand]);
}

// The inputs of a loop: the numbers of each, in the arithmetic type.
template <class F, class S>
struct Inputs {
  using T = typename ArithmeticOf<S>::Type;
  static constexpr int kOfStorage = F::kInputs - (F::kIsMasked ? 1 : 0);

  explicit KL_EXT_INLINE Inputs(const void* const* inputs) {
    static_assert(!F::kIsMasked);
    for (int input = 0; input < F::kInputs; ++input) {
      data[input] = static_cast<const S*>(inputs[input]);
    }
  }

  // The operands from `operand` on.
  KL_EXT_INLINE Inputs(const Block& block, int operand, std::int64_t row, std::int64_t column = 0) {
    for (int input = 0; input < kOfStorage; ++input) {
      data[input] = row_of<const S>(block, operand + input, row) + column;
    }
    if constexpr (F::kIsMasked) {
      mask = row_of<const math::Bool>(block, operand + kOfStorage, row) + column;
    }
  }

  template <int kNumbers>
  KL_EXT_INLINE void read(T (&values)[kNumbers][F::kInputs], std::int64_t i) const {
    KL_EXT_UNROLL
    for (int input = 0; input < kOfStorage; ++input) {
      T numbers[kNumbers];
      read_group(numbers, data[input] + i);
      const bool is_clamped = input % 2 == 1; // a log-variance
      KL_EXT_UNROLL
      for (int n = 0; n < kNumbers; ++n) {
        values[n][input] = sizeof(S) == 2 && is_clamped ? detach(numbers[n]) : numbers[n];
      }
    }
    if constexpr (F::kIsMasked) {
      KL_EXT_UNROLL
      for (int n = 0; n < kNumbers; ++n) {
        values[n][kOfStorage] = static_cast<T>(math::widen(mask[i + n]));
      }
    }
  }

  KL_EXT_INLINE Inputs from(std::int64_t i) const {
    Inputs result = *this;
    for (const S*& input : result.data) {
      input += i;
    }
    if constexpr (F::kIsMasked) {
      result.mask += i;
    }
    return result;
  }

  const S* data[kOfStorage];
  struct None {};
  [[no_unique_address]] std::conditional_t<F::kIsMasked, const math::Bool*, None> mask{}; // the last input, if it is a mask
  Detach<T> detach;
};

// The terms of the inputs from number i on.
template <class F, Range range, int kNumbers, class S, class T>
KL_EXT_INLINE void compute_terms(T (&terms)[kNumbers], const Inputs<F, S>& inputs, std::int64_t i,
                                 const math::Settings<T>& settings) {
  T values[kNumbers][F::kInputs];
  inputs.read(values, i);
  KL_EXT_UNROLL
  for (int n = 0; n < kNumbers; ++n) {
    terms[n] = F::template forward<range>(values[n], settings);
  }
}

} // namespace
} // namespace kl_ext::cpu::KL_EXT_CPU_CAPABILITY
