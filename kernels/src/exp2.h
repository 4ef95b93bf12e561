// 2^x for a vector of x <= 0 (or barely above), relative error about 1e-7.
// Included after one of the simd headers.
#pragma once

namespace gk {
namespace {

GK_INLINE vf exp2_vector(vf x) {
  // Below -150 everything rounds to zero; -160 keeps minus infinity out of the arithmetic.
  x = at_least(set1(-160.0f), x);
  const vf n = round_int(x);
  const vf f = fma(n, set1(-1.0f), x);
  // Minimax polynomial of degree 6 for 2^f on [-1/2, 1/2], relative error 2e-9 before rounding.
  vf p = set1(0.00015353359091836716f);
  p = fma(p, f, set1(0.0013398875421074367f));
  p = fma(p, f, set1(0.009618437377031261f));
  p = fma(p, f, set1(0.05550332467938712f));
  p = fma(p, f, set1(0.24022647913340717f));
  p = fma(p, f, set1(0.6931472028570798f));
  p = fma(p, f, set1(1.0f));
  return scale2(p, n);
}
GK_INLINE float exp2_scalar(float x) { return lane0(exp2_vector(set1(x))); }

}  // namespace
}  // namespace gk
