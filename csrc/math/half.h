// float16 and bfloat16 as 16 bits: widened exactly, narrowed with one rounding to nearest even. A bool as its byte, read only.
#pragma once

#include "platform.h"

namespace kl_ext::math {

struct Half {
  std::uint16_t bits;
};

struct BFloat16 {
  std::uint16_t bits;
};

struct Bool {
  std::uint8_t byte;
};

KL_EXT_INLINE float widen(Bool x) { return x.byte != 0 ? 1.0f : 0.0f; }

KL_EXT_INLINE float widen(BFloat16 x) { return from_bits<float>(std::uint32_t{x.bits} << 16); }

// The exponent moves from bias 15 to bias 127 by a multiplication, which also makes subnormals normal.
KL_EXT_INLINE float widen(Half x) {
  const std::uint32_t sign = std::uint32_t{x.bits & 0x8000u} << 16;
  const std::uint32_t magnitude = std::uint32_t{x.bits & 0x7fffu} << 13;
  const std::uint32_t finite = to_bits(from_bits<float>(magnitude) * 0x1p112f);
  return from_bits<float>(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
}

KL_EXT_INLINE float widen(float x) { return x; }

KL_EXT_INLINE double widen(double x) { return x; }

// Rounds x to bfloat16 in the upper 16 bits; the lower 16 mean nothing. Adding just under half a unit of the last kept place,
// and one more if that place is odd, rounds to nearest even. NaN stays NaN if its lower 16 bits are 0, as they are in every NaN
// that arithmetic makes of bfloat16 numbers.
KL_EXT_INLINE std::uint32_t round_to_bfloat16(float x) {
  const std::uint32_t bits = to_bits(x);
  return (bits | ((bits >> 16) & 1)) + 0x7fff;
}

KL_EXT_INLINE void narrow(BFloat16& out, float x) {
  out.bits = static_cast<std::uint16_t>(x != x ? 0x7fc0u : round_to_bfloat16(x) >> 16);
}

// Normal results are rounded in the bits, as for bfloat16; subnormal ones by adding 1/2, whose ulp is the smallest subnormal.
KL_EXT_INLINE void narrow(Half& out, float x) {
  const std::uint32_t bits = to_bits(x);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1)) >> 13;
  const std::uint32_t subnormal = to_bits(from_bits<float>(magnitude) + 0.5f) - to_bits(0.5f);
  const std::uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  // Infinity, or NaN with one bit more: between two constants GCC 11 would choose by a jump, and vectorise nothing.
  const std::uint32_t large = 0x7c00u | (std::uint32_t{magnitude > 0x7f800000u} << 9);
  out.bits = static_cast<std::uint16_t>(sign | (magnitude >= 0x477ff000u ? large : finite));
}

KL_EXT_INLINE void narrow(float& out, float x) { out = x; }

KL_EXT_INLINE void narrow(double& out, float x) { out = x; }

KL_EXT_INLINE void narrow(float& out, double x) { out = static_cast<float>(x); }

KL_EXT_INLINE void narrow(double& out, double x) { out = x; }

// Rounds to odd in float first, so that the second rounding sees whether anything was cut off.
template <class S>
KL_EXT_INLINE void narrow(S& out, double x) {
  const float nearest = static_cast<float>(x);
  const bool away = ((nearest > 0) & (nearest > x)) | ((nearest < 0) & (nearest < x)); // never for a zero
  const std::uint32_t toward_zero = to_bits(nearest) - (away ? 1 : 0);
  const bool inexact = static_cast<double>(from_bits<float>(toward_zero)) != x;
  narrow(out, from_bits<float>(toward_zero | (inexact ? 1 : 0)));
}

} // namespace kl_ext::math
