// bf16 and fp16 as bit patterns, converted by integer arithmetic, of which loops make SIMD code.
#pragma once

#include <cstdint>

#include "params.h"

namespace fusedres::cpu {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

FUSEDRES_INLINE float to_float(bfloat16 v) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(v.bits) << 16);
}

FUSEDRES_INLINE bfloat16 to_bfloat16(float v) {  // round to nearest even; NaN stays NaN
  const uint32_t u = __builtin_bit_cast(uint32_t, v);
  const uint32_t rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>(v != v ? 0x7FC0 : rounded)};
}

// Exponent and mantissa in place, then one multiplication mends the bias.
FUSEDRES_INLINE float to_float(float16 v) {
  const uint32_t magnitude = (v.bits & 0x7FFFu) << 13, sign = (v.bits & 0x8000u) << 16;
  const float scaled = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  const uint32_t u = __builtin_bit_cast(uint32_t, scaled);
  const uint32_t infinite = magnitude | 0x7F800000u;  // inf and NaN keep an all-ones exponent
  return __builtin_bit_cast(float, (magnitude >= 0x0F800000u ? infinite : u) | sign);
}

FUSEDRES_INLINE float16 to_float16(float v) {  // round to nearest even, also to subnormals
  const uint32_t u = __builtin_bit_cast(uint32_t, v), sign = (u >> 16) & 0x8000u,
                 m = u & 0x7FFFFFFFu;
  const uint32_t normal = (m - 0x38000000u + 0xFFFu + ((m >> 13) & 1)) >> 13;
  const float shifted = __builtin_bit_cast(float, m) + 0.5f;  // aligns a subnormal's last bit
  const uint32_t subnormal = __builtin_bit_cast(uint32_t, shifted) - 0x3F000000u;
  uint32_t h = m < 0x38800000u ? subnormal : normal;
  h = m >= 0x477FF000u ? 0x7C00u : h;  // rounds to infinity
  h = m > 0x7F800000u ? 0x7E00u : h;   // NaN
  return {static_cast<uint16_t>(h | sign)};
}

// The same names for every type, so that loops need not know which they load and store.
FUSEDRES_INLINE float to_float(float v) { return v; }
FUSEDRES_INLINE double to_float(double v) { return v; }

FUSEDRES_INLINE void from_float(float v, bfloat16& out) { out = to_bfloat16(v); }
FUSEDRES_INLINE void from_float(float v, float16& out) { out = to_float16(v); }
FUSEDRES_INLINE void from_float(double v, bfloat16& out) {
  out = to_bfloat16(static_cast<float>(v));
}
FUSEDRES_INLINE void from_float(double v, float16& out) { out = to_float16(static_cast<float>(v)); }
template <class A, class T>
FUSEDRES_INLINE void from_float(A v, T& out) {
  out = static_cast<T>(v);
}

}  // namespace fusedres::cpu
