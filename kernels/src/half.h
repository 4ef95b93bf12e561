// Scalar conversions between float32 and the 16-bit formats, round to nearest even.
#pragma once
#include <cstdint>
#include <cstring>

namespace gk {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u)  // infinity and NaN
    return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // 2^112 moves the exponent bias from 15 to 127, subnormals included.
  const float f = bits_to_float(magnitude << 13) * 5.192296858534828e33f;
  return bits_to_float(sign | float_to_bits(f));
}

inline void from_float(float x, float *out) { *out = x; }
inline void from_float(float x, bf16 *out) {
  const uint32_t u = float_to_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u)
    out->bits = uint16_t((u >> 16) | 0x40u);
  else
    out->bits = uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
inline void from_float(float x, f16 *out) {
  const uint32_t u = float_to_bits(x);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000u);
  uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) {
    out->bits = uint16_t(sign | 0x7e00u);
  } else if (a >= 0x47800000u) {  // 65536 and above
    out->bits = uint16_t(sign | 0x7c00u);
  } else if (a < 0x38800000u) {  // subnormal: let the float adder round at 2^-24
    const float f = bits_to_float(a) + 0.5f;
    out->bits = uint16_t(sign | (float_to_bits(f) - 0x3f000000u));
  } else {
    a += 0xfffu + ((a >> 13) & 1u);
    out->bits = uint16_t(sign | ((a - 0x38000000u) >> 13));
  }
}

}  // namespace
}  // namespace gk
