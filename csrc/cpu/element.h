// 16-bit element types as bits, converted by hand: no compiler extension, and loops over them vectorise.
#pragma once
#include <stdint.h>

#include <cstring>

namespace fi::cpu {

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BF16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float to_float(F16 x) {
  uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  float finite = float_of(magnitude) * 0x1p112f;  // rebias; exact for subnormals too
  float special = float_of(magnitude | 0x7f800000);
  float value = magnitude >= (0x7c00u << 13) ? special : finite;
  return float_of(bits_of(value) | uint32_t(x.bits & 0x8000) << 16);
}

// Round to nearest, ties to even.
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline BF16 from_float<BF16>(float x) {
  uint32_t u = bits_of(x);
  if (x != x) return {uint16_t(u >> 16 | 0x40)};  // rounding could carry a NaN into infinity
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <>
inline F16 from_float<F16>(float x) {
  uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= bits_of(65520.f)) {
    half = 0x7c00;
  } else if (magnitude < bits_of(0x1p-14f)) {
    // one ulp of 0.5 is the smallest half: the addition rounds, its low bits are the result
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    half = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  }
  return {uint16_t(sign | half)};
}

}  // namespace fi::cpu
