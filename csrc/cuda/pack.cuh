// The 16 bytes of an operand that a thread moves at once: in memory, and in registers.
#pragma once

#include <type_traits>

#include "layout.h"

namespace kl_ext::cuda {

// Copied as a whole, which compiles to accesses of 16 bytes: number by number or with memcpy it need not.
template <class S, int kItems>
struct alignas(kVectorBytes) Pack {
  S values[kItems];
};

// A pack as it is held until it is used: half types by twos. Held one by one, they would be cut out of a vector in the branch
// that loads it, which would wait for it before the loads of the branches that follow.
template <class S, int kItems>
struct Held {
  static constexpr int kNumbers = sizeof(S) == 2 ? 2 : 1; // to a word
  using Word = std::conditional_t<kNumbers == 2, std::uint32_t, S>;

  Pack<Word, kItems / kNumbers> words;

  KL_EXT_INLINE S get(int item) const {
    if constexpr (kNumbers == 2) {
      return {static_cast<std::uint16_t>(words.values[item / 2] >> item % 2 * 16)};
    } else {
      return words.values[item];
    }
  }

  // Where there are zero bits.
  KL_EXT_INLINE void set(int item, S value) {
    if constexpr (kNumbers == 2) {
      words.values[item / 2] |= std::uint32_t{value.bits} << item % 2 * 16;
    } else {
      words.values[item] = value;
    }
  }
};

} // namespace kl_ext::cuda
