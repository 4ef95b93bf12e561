// Four floats, Advanced SIMD on 64-bit Arm.
#pragma once
#include <arm_neon.h>

#include "half.h"

#define GK_INLINE static inline __attribute__((always_inline))

namespace gk {
namespace {

using vf = float32x4_t;
constexpr int W = 4;
constexpr int MR = 6, NV = 4;
constexpr int PR = 6, PC = 4;
constexpr int ACC = 24;

GK_INLINE vf zero() { return vdupq_n_f32(0.0f); }
GK_INLINE vf set1(float x) { return vdupq_n_f32(x); }
GK_INLINE vf fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
GK_INLINE vf add(vf a, vf b) { return vaddq_f32(a, b); }
GK_INLINE vf mul(vf a, vf b) { return vmulq_f32(a, b); }
GK_INLINE vf vmax(vf a, vf b) { return vmaxq_f32(a, b); }
GK_INLINE float hmax(vf a) { return vmaxvq_f32(a); }
GK_INLINE float hsum(vf a) { return vaddvq_f32(a); }
GK_INLINE float lane0(vf a) { return vgetq_lane_f32(a, 0); }
// Into the second-level cache: what is in use fills the first, and waiting for a place there
// stalls the loads.
GK_INLINE void prefetch(const void *p) { __builtin_prefetch(p, 0, 2); }

GK_INLINE vf load(const float *p) { return vld1q_f32(p); }
GK_INLINE vf load(const bf16 *p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t *>(p)), 16));
}
GK_INLINE vf load(const f16 *p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t *>(p))));
}
template <class T>
GK_INLINE vf load_n(const T *p, int n) {
  T buffer[W] = {};
  std::memcpy(buffer, p, sizeof(T) * size_t(n));
  return load(buffer);
}
GK_INLINE void store(float *p, vf a) { vst1q_f32(p, a); }
GK_INLINE void store_n(float *p, vf a, int n) {
  float buffer[W];
  vst1q_f32(buffer, a);
  std::memcpy(p, buffer, sizeof(float) * size_t(n));
}

GK_INLINE vf round_int(vf x) { return vrndnq_f32(x); }
GK_INLINE vf scale2(vf p, vf n) {
  const int32x4_t i = vcvtq_s32_f32(n), half = vshrq_n_s32(i, 1), bias = vdupq_n_s32(127);
  const int32x4_t a = vshlq_n_s32(vaddq_s32(half, bias), 23);
  const int32x4_t b = vshlq_n_s32(vaddq_s32(vsubq_s32(i, half), bias), 23);
  return mul(mul(p, vreinterpretq_f32_s32(a)), vreinterpretq_f32_s32(b));
}
GK_INLINE vf at_least(vf bound, vf x) { return vmaxq_f32(bound, x); }

GK_INLINE void transpose(vf r[W]) {
  const float32x4x2_t a = vtrnq_f32(r[0], r[1]), b = vtrnq_f32(r[2], r[3]);
  r[0] = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
  r[1] = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
  r[2] = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
  r[3] = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}

GK_INLINE vf sum4(vf a0, vf a1, vf a2, vf a3) {
  return vpaddq_f32(vpaddq_f32(a0, a1), vpaddq_f32(a2, a3));
}
GK_INLINE vf sum_chunks(const vf c[W / 4]) { return c[0]; }

}  // namespace
}  // namespace gk
