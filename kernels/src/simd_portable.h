// Four floats in plain C++, for processors with none of the other instruction sets.
#pragma once
#include <cmath>

#include "half.h"

#define GK_INLINE static inline __attribute__((always_inline))

namespace gk {
namespace {

constexpr int W = 4;
struct vf {
  float x[W];
};
constexpr int MR = 4, NV = 2;
constexpr int PR = 4, PC = 2;
constexpr int ACC = 8;

template <class F>
GK_INLINE vf map(F f) {
  vf r;
  for (int i = 0; i < W; ++i) r.x[i] = f(i);
  return r;
}

GK_INLINE vf zero() { return vf{}; }
GK_INLINE vf set1(float x) { return map([&](int) { return x; }); }
GK_INLINE vf fma(vf a, vf b, vf c) { return map([&](int i) { return a.x[i] * b.x[i] + c.x[i]; }); }
GK_INLINE vf add(vf a, vf b) { return map([&](int i) { return a.x[i] + b.x[i]; }); }
GK_INLINE vf mul(vf a, vf b) { return map([&](int i) { return a.x[i] * b.x[i]; }); }
GK_INLINE vf vmax(vf a, vf b) { return map([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; }); }
GK_INLINE float hmax(vf a) {
  float m = a.x[0];
  for (int i = 1; i < W; ++i) m = m > a.x[i] ? m : a.x[i];
  return m;
}
GK_INLINE float hsum(vf a) { return (a.x[0] + a.x[1]) + (a.x[2] + a.x[3]); }
GK_INLINE float lane0(vf a) { return a.x[0]; }
// Into the second-level cache: what is in use fills the first, and waiting for a place there
// stalls the loads.
GK_INLINE void prefetch(const void *p) { __builtin_prefetch(p, 0, 2); }

template <class T>
GK_INLINE vf load(const T *p) {
  return map([&](int i) { return to_float(p[i]); });
}
template <class T>
GK_INLINE vf load_n(const T *p, int n) {
  return map([&](int i) { return i < n ? to_float(p[i]) : 0.0f; });
}
GK_INLINE void store(float *p, vf a) { std::memcpy(p, a.x, sizeof(a.x)); }
GK_INLINE void store_n(float *p, vf a, int n) { std::memcpy(p, a.x, sizeof(float) * size_t(n)); }

GK_INLINE vf round_int(vf x) { return map([&](int i) { return nearbyintf(x.x[i]); }); }
GK_INLINE vf scale2(vf p, vf n) {
  return map([&](int i) { return n.x[i] == n.x[i] ? ldexpf(p.x[i], int(n.x[i])) : n.x[i]; });
}
GK_INLINE vf at_least(vf bound, vf x) {
  return map([&](int i) { return bound.x[i] > x.x[i] ? bound.x[i] : x.x[i]; });
}

GK_INLINE void transpose(vf r[W]) {
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < i; ++j) {
      const float t = r[i].x[j];
      r[i].x[j] = r[j].x[i];
      r[j].x[i] = t;
    }
}
GK_INLINE vf sum4(vf a, vf b, vf c, vf d) { return vf{{hsum(a), hsum(b), hsum(c), hsum(d)}}; }
GK_INLINE vf sum_chunks(const vf c[W / 4]) { return c[0]; }

}  // namespace
}  // namespace gk
