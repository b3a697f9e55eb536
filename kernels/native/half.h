// float16 (IEEE binary16) as float32 and back, to nearest, ties to even; a NaN stays one.

#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace prescore {

inline float widen_half(uint16_t x) {
  const uint32_t rest = x & 0x7fff;
  float y = (float)rest * 0x1p-24f;  // subnormal
  if (rest >= 0x0400) {
    const uint32_t bits = (rest << 13) + (rest < 0x7c00 ? 112u << 23 : 0x70000000);  // the exponent's bias; inf, NaN
    std::memcpy(&y, &bits, 4);
  }
  return x & 0x8000 ? -y : y;
}

inline uint16_t narrow_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;   // NaN
  if (bits >= 0x477ff000) return sign | 0x7c00;  // from 65520 on: inf
  if (bits >= 0x38800000) return sign | (uint16_t)((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
  float y;  // subnormal: a sum with 0.5 rounds at the same bit
  std::memcpy(&y, &bits, 4);
  y += 0.5f;
  std::memcpy(&bits, &y, 4);
  return sign | (uint16_t)(bits - 0x3f000000);
}

inline vec load_half(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__) && defined(__F16C__)
  return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vec x;
  for (int i = 0; i < L; ++i) x[i] = widen_half(p[i]);
  return x;
#endif
}

inline void store_half(uint16_t* p, vec x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__) && defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < L; ++i) p[i] = narrow_half(x[i]);
#endif
}

}  // namespace prescore
