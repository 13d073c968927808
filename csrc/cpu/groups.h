// How the loops of the formulas read and write numbers: in groups of neighbours in memory. A group of float16, float32 or
// float64 is one number. A group of bfloat16 is a word of two, each of which is widened and narrowed in place: a vector of
// words becomes two vectors of numbers, and nothing crosses their lanes.
#pragma once

#include "../math/half.h"

// Tells the compiler that no iteration depends on another.
#if defined(__clang__)
#define KL_EXT_LOOP _Pragma("clang loop vectorize(assume_safety)")
#else
#define KL_EXT_LOOP _Pragma("GCC ivdep")
#endif
// Inlines a lambda.
#define KL_EXT_INLINE_LAMBDA __attribute__((always_inline))

namespace kl_ext::cpu::KL_EXT_CPU_CAPABILITY {
namespace {

template <class S>
struct ArithmeticOf {
  using Type = float;
};

template <>
struct ArithmeticOf<double> {
  using Type = double;
};

template <class S>
constexpr int kGroup = 1;

template <>
constexpr int kGroup<math::BFloat16> = 2;

template <class S, class T>
KL_EXT_INLINE void read_group(T (&numbers)[1], const S* from) {
  numbers[0] = math::widen(*from);
}

template <class S, class T>
KL_EXT_INLINE void write_group(S* to, const T (&numbers)[1]) {
  math::narrow(*to, numbers[0]);
}

constexpr std::uint32_t kUpperHalf = 0xffff0000u;
// Which of two numbers is the lower half of their word.
constexpr int kLower = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? 0 : 1;
constexpr int kUpper = 1 - kLower;

KL_EXT_INLINE void read_group(float (&numbers)[2], const math::BFloat16* from) {
  std::uint32_t word;
  __builtin_memcpy(&word, from, sizeof(word));
  numbers[kLower] = math::from_bits<float>(word << 16);
  numbers[kUpper] = math::from_bits<float>(word & kUpperHalf);
}

// For numbers computed from bfloat16 numbers: their NaN need no check, which would take a tenth of a loss.
KL_EXT_INLINE void write_group(math::BFloat16* to, const float (&numbers)[2]) {
  const std::uint32_t lower = math::round_to_bfloat16(numbers[kLower]) >> 16;
  const std::uint32_t upper = math::round_to_bfloat16(numbers[kUpper]);
  const std::uint32_t word = lower ^ ((lower ^ upper) & kUpperHalf); // a single instruction of AVX-512
  __builtin_memcpy(to, &word, sizeof(word));
}

// How many numbers are computed at once.
template <int kNumbers>
struct Count {};

// Calls run(Count<n>(), i) with the index i of the first of n numbers: for each group, and for a number that is left over.
template <class S, class Run>
KL_EXT_INLINE void for_each_group(std::int64_t numel, const Run& run) {
  constexpr int kNumbers = kGroup<S>;
  const std::int64_t groups = numel / kNumbers;
  KL_EXT_LOOP
  for (std::int64_t group = 0; group < groups; ++group) {
    run(Count<kNumbers>(), kNumbers * group);
  }
  if constexpr (kNumbers > 1) {
    static_assert(kNumbers == 2);
    if (numel % kNumbers != 0) {
      run(Count<1>(), numel - 1);
    }
  }
}

// If a maximum follows a bit operation, GCC makes a comparison for AVX-512 and the bit operation once more, under a mask: three
// times as slow. Subtracting a zero that GCC does not know separates the two, and changes no number.
template <class T>
class Detach {
 public:
#if defined(__AVX512F__) && !defined(__clang__)
  KL_EXT_INLINE Detach() {
    typename math::Format<T>::Bits zero = 0;
    __asm__("" : "+r"(zero));
    zero_ = math::from_bits<T>(zero);
  }

  KL_EXT_INLINE T operator()(T x) const { return x - zero_; }

 private:
  T zero_;
#else
  KL_EXT_INLINE T operator()(T x) const { return x; }
#endif
};

} // namespace
} // namespace kl_ext::cpu::KL_EXT_CPU_CAPABILITY
