// bfloat16 and the arithmetic of devices, for the emulator.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <cmath>
#include <new>
#include <type_traits>

#include "../cuda_on_host.h"

inline int __float_as_int(float x) {
  int bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float __int_as_float(int bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdividef(float x, float y) { return x / y; }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(uint64_t(x) * y >> 32); }
inline int min(int x, int y) { return x < y ? x : y; }
inline int max(int x, int y) { return x > y ? x : y; }
inline int __vimax3_s32(int x, int y, int z) { return max(max(x, y), z); }
inline unsigned __vimin3_u32(unsigned x, unsigned y, unsigned z) {
  unsigned least = x < y ? x : y;
  return least < z ? least : z;
}

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {
    uint32_t word = uint32_t(__float_as_int(x));
    bits = x == x ? uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16) : 0x7fff;  // to the nearest, or even
  }
  explicit operator float() const { return __int_as_float(int(uint32_t(bits) << 16)); }
};
