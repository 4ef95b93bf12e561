// Eight floats, AVX2 with FMA and F16C.
#pragma once
#include <immintrin.h>

#include "half.h"

#define GK_INLINE static inline __attribute__((always_inline))

namespace gk {
namespace {

using vf = __m256;
constexpr int W = 8;
constexpr int MR = 6, NV = 2;
constexpr int PR = 6, PC = 2;
constexpr int ACC = 12;

GK_INLINE __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

GK_INLINE vf zero() { return _mm256_setzero_ps(); }
GK_INLINE vf set1(float x) { return _mm256_set1_ps(x); }
GK_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
GK_INLINE vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
GK_INLINE vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
GK_INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
GK_INLINE float hmax(vf a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
GK_INLINE float hsum(vf a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
GK_INLINE float lane0(vf a) { return _mm256_cvtss_f32(a); }
// Into the second-level cache: what is in use fills the first, and waiting for a place there
// stalls the loads.
GK_INLINE void prefetch(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T1); }

GK_INLINE vf load(const float *p) { return _mm256_loadu_ps(p); }
GK_INLINE vf load(const bf16 *p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
GK_INLINE vf load(const f16 *p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
GK_INLINE vf load_n(const float *p, int n) { return _mm256_maskload_ps(p, first(n)); }
template <class T>
GK_INLINE vf load_n(const T *p, int n) {
  T buffer[W] = {};
  std::memcpy(buffer, p, sizeof(T) * size_t(n));
  return load(buffer);
}
GK_INLINE void store(float *p, vf a) { _mm256_storeu_ps(p, a); }
GK_INLINE void store_n(float *p, vf a, int n) { _mm256_maskstore_ps(p, first(n), a); }

GK_INLINE vf round_int(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
GK_INLINE vf scale2(vf p, vf n) {
  // Two factors, so that results below 2^-126 underflow gradually.
  const __m256i i = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(i, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i a = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i b = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(i, half), bias), 23);
  return mul(mul(p, _mm256_castsi256_ps(a)), _mm256_castsi256_ps(b));
}
GK_INLINE vf at_least(vf bound, vf x) { return _mm256_max_ps(bound, x); }

GK_INLINE void transpose(vf r[W]) {
  vf t[8];
  for (int i = 0; i < 8; i += 4) {
    const vf a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
    const vf c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm256_permute2f128_ps(t[j], t[4 + j], 0x20);
    r[4 + j] = _mm256_permute2f128_ps(t[j], t[4 + j], 0x31);
  }
}

GK_INLINE vf sum4(vf a0, vf a1, vf a2, vf a3) {
  return _mm256_hadd_ps(_mm256_hadd_ps(a0, a1), _mm256_hadd_ps(a2, a3));
}
GK_INLINE vf sum_chunks(const vf c[W / 4]) {
  return add(_mm256_permute2f128_ps(c[0], c[1], 0x20), _mm256_permute2f128_ps(c[0], c[1], 0x31));
}

}  // namespace
}  // namespace gk
