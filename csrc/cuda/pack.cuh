// The 16 bytes of an operand that a thread moves at once, in memory and in registers.
#pragma once

#include <type_traits>

#include "layout.h"

namespace kl_ext::cuda {

// Copied as a whole, which compiles to 16-byte accesses; copying number by number or by memcpy may not.
template <class S, int kItems>
struct alignas(kVectorBytes) Pack {
  S values[kItems];
};

// A pack as it is held until it is used: half types in pairs. Held one by one, they would be extracted from a vector in the
// branch that loads it, which would then wait for the load before the next branches can load.
template <class S, int kItems>
struct Held {
  static constexpr int kNumbers = sizeof(S) == 2 ? 2 : 1; // in a word
  using Word = std::conditional_t<kNumbers == 2, std::uint32_t, S>;

  Pack<Word, kItems / kNumbers> words;

  KL_EXT_INLINE S get(int item) const {
    if constexpr (kNumbers == 2) {
      return {static_cast<std::uint16_t>(words.values[item / 2] >> item % 2 * 16)};
    } else {
      return words.values[item];
    }
  }

  // Sets a number whose bits are zero so far.
  KL_EXT_INLINE void set(int item, S value) {
    if constexpr (kNumbers == 2) {
      words.values[item / 2] |= std::uint32_t{value.bits} << item % 2 * 16;
    } else {
      words.values[item] = value;
    }
  }
};

} // namespace kl_ext::cuda
