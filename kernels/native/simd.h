// Vectors of the machine's own width, in GCC/Clang vector extensions: AVX-512, AVX2, NEON and SSE.
//
// The width is the register's and not more: a vector wider than a register goes through memory at
// every step in GCC, which makes the same code ten times slower.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace prescore {

#if defined(__AVX512F__)
constexpr int L = 16;
#elif defined(__AVX__)
constexpr int L = 8;
#else
constexpr int L = 4;
#endif

typedef float vec __attribute__((vector_size(4 * L)));
typedef int32_t ivec __attribute__((vector_size(4 * L)));
// The same in memory, anywhere. Of variables that are not aligned Clang forgets to align what it puts on the stack.
typedef float vec_there __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef int32_t ivec_there __attribute__((vector_size(4 * L), aligned(4), may_alias));

constexpr double LOG2_E = 1.44269504088896340736;
constexpr float NEG_INF = -std::numeric_limits<float>::infinity();

// Features rounded up to whole vectors.
inline int64_t whole(int64_t features) { return (features + L - 1) / L * L; }

inline vec splat(float x) { return vec{} + x; }
inline ivec isplat(int32_t x) { return ivec{} + x; }
inline vec load(const float* p) { return *reinterpret_cast<const vec_there*>(p); }
inline ivec iload(const int32_t* p) { return *reinterpret_cast<const ivec_there*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<vec_there*>(p) = x; }
inline void istore(int32_t* p, ivec x) { *reinterpret_cast<ivec_there*>(p) = x; }

// As bfloat16, to nearest, ties to even; a NaN stays one.
inline void store_narrow(uint16_t* p, vec x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  const ivec as_bits = (ivec)x, rounded = (as_bits + 0x7fff + ((as_bits >> 16) & 1)) >> 16;
  const ivec kept = x == x ? rounded : isplat(0x7fc0);
  for (int i = 0; i < L; ++i) p[i] = (uint16_t)kept[i];
#endif
}

inline vec load_narrow(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  ivec x;
  for (int i = 0; i < L; ++i) x[i] = (int32_t)((uint32_t)p[i] << 16);
  return (vec)x;
#endif
}

// A NaN in x is passed over.
inline vec larger(vec best, vec x) { return x > best ? x : best; }

inline float max_lane(vec x) {
  float best = x[0];
  for (int i = 1; i < L; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// In halves, as one after the other takes L times as long.
inline float sum_lanes(vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  for (int half = L / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
#endif
}

inline int32_t sum_lanes(ivec x) {
  int32_t total = 0;
  for (int i = 0; i < L; ++i) total += x[i];
  return total;
}

// Bit i: lane i of a comparison holds.
inline uint32_t bits(ivec holds) {
#if defined(__AVX512F__)
  return _mm512_cmplt_epi32_mask((__m512i)holds, _mm512_setzero_si512());
#elif defined(__AVX2__)
  return (uint32_t)_mm256_movemask_ps((__m256)holds);
#else
  uint32_t found = 0;
  for (int i = 0; i < L; ++i) found |= (uint32_t)(holds[i] & 1) << i;
  return found;
#endif
}

inline ivec iota() {
  ivec x = {};
  for (int i = 0; i < L; ++i) x[i] = i;
  return x;
}

// The comparison whose lane i is bit i of `mask`.
inline ivec lanes_of(uint32_t mask) { return ((isplat((int32_t)mask) >> iota()) & 1) != 0; }

// Lane i is x's where bit i of `mask` is set, else y's.
inline vec choose(uint32_t mask, vec x, vec y) {
#if defined(__AVX512F__)
  return (vec)_mm512_mask_blend_ps((__mmask16)mask, (__m512)y, (__m512)x);
#else
  return lanes_of(mask) ? x : y;
#endif
}

inline vec root(vec x) {
#if defined(__AVX512F__)
  return (vec)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vec)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < L; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// 2^x for x <= 127; a NaN stays a NaN, what is below 2^-126 becomes that. The polynomial is
// that of Cephes' exp2f, about 2 ulp.
inline vec exp2_vec(vec x) {
  x = x < splat(-126.0f) ? splat(-126.0f) : x;
  const vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vec n = x + shift;
  const vec r = x - (n - shift);
  vec p = splat(1.535336188319500e-4f);
  p = p * r + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  return p * (vec)(((ivec)n - (ivec)shift + 127) << 23);
}

// The same to 3e-6, by least squares, for what is rounded to bfloat16; 2^-126 below that.
inline vec exp2_rough(vec x) {
#if defined(__AVX512F__)
  const __m512 from = _mm512_max_ps(_mm512_set1_ps(-126.0f), (__m512)x);  // a NaN stays
  const __m512 n = _mm512_roundscale_ps(from, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vec r = (vec)_mm512_sub_ps(from, n);
  vec p = splat(0.0095605102f);
  p = p * r + 0.055917039f;
  p = p * r + 0.24024981f;
  p = p * r + 0.69312197f;
  p = p * r + 0.99999919f;
  return (vec)_mm512_scalef_ps((__m512)p, n);
#else
  return exp2_vec(x);
#endif
}

// To 2e-7 of itself, from Cephes' tanhf: near 0 by a polynomial, as the other form is a difference there. A NaN stays.
inline vec tanh_vec(vec x) {
  const vec z = x * x;
  vec p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const vec near = p * z * x + x, power = x * (float)(2 * LOG2_E);
  const vec far = 1.0f - 2.0f / (exp2_vec(power > 60.0f ? splat(60.0f) : power) + 1.0f);
  return z < 0.390625f ? near : far;
}

// Products of N rows with the columns of key [dim][V * L], held in registers.
template <int N, int V>
inline void products(const float* const* row, int64_t dim, const float* key, vec (&sum)[N][V]) {
  vec s[N][V] = {};
  for (int64_t d = 0; d < dim; ++d) {
    vec k[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) k[v] = load(key + (d * V + v) * L);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      const float q = row[i][d];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) s[i][v] += k[v] * q;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[i][v] = s[i][v];
}

// Run body.run<N>(first row) over `count` rows in near-equal groups of at most M: nearly full groups
// keep more sums in flight than full groups and a last one of a row or two.
template <int M, int N, typename Body>
inline void run_group(Body& body, int64_t size, int64_t first) {
  if (size == N) return body.template run<N>(first);
  if constexpr (N > 1) run_group<M, N - 1>(body, size, first);
}

template <int M, typename Body>
inline void by_groups(int64_t count, Body&& body) {
  const int64_t groups = (count + M - 1) / M;
  for (int64_t group = 0, first = 0; group < groups; ++group) {
    const int64_t size = (count - first) / (groups - group);
    run_group<M, M>(body, size, first);
    first += size;
  }
}

}  // namespace prescore
