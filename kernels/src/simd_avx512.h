// Sixteen floats, AVX-512 (F, BW, DQ, VL).
#pragma once
#include <immintrin.h>

#include "half.h"

#define GK_INLINE static inline __attribute__((always_inline))

namespace gk {
namespace {

using vf = __m512;
constexpr int W = 16;            // lanes
constexpr int MR = 12, NV = 2;   // score tile: rows, key vectors
constexpr int PR = 6, PC = 4;    // value tile: rows, column vectors
constexpr int ACC = 24;          // accumulators that fit beside their operands

GK_INLINE __mmask16 first(int n) { return __mmask16((1u << n) - 1u); }

GK_INLINE vf zero() { return _mm512_setzero_ps(); }
GK_INLINE vf set1(float x) { return _mm512_set1_ps(x); }
GK_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
GK_INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
GK_INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
GK_INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
GK_INLINE float hmax(vf a) { return _mm512_reduce_max_ps(a); }
GK_INLINE float hsum(vf a) { return _mm512_reduce_add_ps(a); }
GK_INLINE float lane0(vf a) { return _mm512_cvtss_f32(a); }
// Into the second-level cache: what is in use fills the first, and waiting for a place there
// stalls the loads.
GK_INLINE void prefetch(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T1); }

GK_INLINE vf load(const float *p) { return _mm512_loadu_ps(p); }
GK_INLINE vf load(const bf16 *p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
GK_INLINE vf load(const f16 *p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
// The first n lanes, zeros behind; never touches memory past p[n - 1].
GK_INLINE vf load_n(const float *p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
GK_INLINE vf load_n(const bf16 *p, int n) {
  const __m256i h = _mm256_maskz_loadu_epi16(first(n), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
GK_INLINE vf load_n(const f16 *p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
}
GK_INLINE void store(float *p, vf a) { _mm512_storeu_ps(p, a); }
GK_INLINE void store_n(float *p, vf a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }

// 2^n · p for integral n in [-160, 1]; underflow is gradual.
GK_INLINE vf round_int(vf x) { return _mm512_roundscale_ps(x, 0x08); }
GK_INLINE vf scale2(vf p, vf n) { return _mm512_scalef_ps(p, n); }
// The larger of a bound and x; a NaN in x stays.
GK_INLINE vf at_least(vf bound, vf x) { return _mm512_max_ps(bound, x); }

GK_INLINE void transpose(vf r[W]) {
  vf t[16];
  for (int i = 0; i < 16; i += 4) {
    const vf a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]);
    const vf c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
    const auto pd = [](vf x) { return _mm512_castps_pd(x); };
    t[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(a), pd(c)));
    t[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(a), pd(c)));
    t[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(b), pd(d)));
    t[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(b), pd(d)));
  }
  for (int j = 0; j < 4; ++j) {  // t[4·i + j] holds column 4·lane + j of rows 4·i …
    const vf a = _mm512_shuffle_f32x4(t[j], t[4 + j], 0x88);
    const vf b = _mm512_shuffle_f32x4(t[j], t[4 + j], 0xdd);
    const vf c = _mm512_shuffle_f32x4(t[8 + j], t[12 + j], 0x88);
    const vf d = _mm512_shuffle_f32x4(t[8 + j], t[12 + j], 0xdd);
    r[j] = _mm512_shuffle_f32x4(a, c, 0x88);
    r[8 + j] = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[4 + j] = _mm512_shuffle_f32x4(b, d, 0x88);
    r[12 + j] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

// Lane i of the result is the sum over the lanes of a[i]; a in chunks of four.
GK_INLINE vf sum4(vf a0, vf a1, vf a2, vf a3) {
  const vf x = add(_mm512_unpacklo_ps(a0, a1), _mm512_unpackhi_ps(a0, a1));
  const vf y = add(_mm512_unpacklo_ps(a2, a3), _mm512_unpackhi_ps(a2, a3));
  const __m512d xd = _mm512_castps_pd(x), yd = _mm512_castps_pd(y);
  return add(_mm512_castpd_ps(_mm512_unpacklo_pd(xd, yd)),
             _mm512_castpd_ps(_mm512_unpackhi_pd(xd, yd)));
}
GK_INLINE vf sum_chunks(const vf c[W / 4]) {
  const vf x = add(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
  const vf y = add(_mm512_shuffle_f32x4(c[2], c[3], 0x88), _mm512_shuffle_f32x4(c[2], c[3], 0xdd));
  return add(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
}

}  // namespace
}  // namespace gk
