// The three inner loops of the CPU executor, on float tiles padded to whole vectors.
#pragma once
#include <stdint.h>

#include "element.h"

namespace fi::cpu {

typedef float Vec __attribute__((vector_size(32)));
constexpr int kLanes = 8;

constexpr int pad(int n, int step) { return (n + step - 1) / step * step; }

inline float sum_of(Vec v) {
  float s = 0.f;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
}

// s[i][j] = scale * q[i] . k[j] for 2 rows and all keys; rows of q and k are kPadded floats, keys a multiple
// of 4.
template <int kPadded, int kKeys>
inline void dot_rows(const float* q, const float* k, int keys, float scale, float* s) {
  constexpr int kVecs = kPadded / kLanes;
  const Vec* q0 = reinterpret_cast<const Vec*>(q);
  const Vec* q1 = q0 + kVecs;
  for (int j = 0; j < keys; j += 4) {
    const Vec* kj = reinterpret_cast<const Vec*>(k + int64_t(j) * kPadded);
    Vec a[2][4] = {};
    for (int d = 0; d < kVecs; ++d) {
      for (int c = 0; c < 4; ++c) {
        a[0][c] += q0[d] * kj[c * kVecs + d];
        a[1][c] += q1[d] * kj[c * kVecs + d];
      }
    }
    for (int c = 0; c < 4; ++c) {
      s[j + c] = scale * sum_of(a[0][c]);
      s[kKeys + j + c] = scale * sum_of(a[1][c]);
    }
  }
}

// o[i] = o[i] * keep[i] + sum_j p[i][j] * v[j] for 2 rows; rows of o and v are kPadded floats, a multiple
// of 32.
template <int kPadded, int kKeys>
inline void add_values(const float* p, const float* v, int keys, const float* keep, float* o) {
  constexpr int kVecs = kPadded / kLanes;
  Vec* o0 = reinterpret_cast<Vec*>(o);
  Vec* o1 = o0 + kVecs;
  for (int d = 0; d < kVecs; d += 4) {
    Vec a[2][4];
    for (int c = 0; c < 4; ++c) a[0][c] = o0[d + c] * keep[0], a[1][c] = o1[d + c] * keep[1];
    for (int j = 0; j < keys; ++j) {
      const Vec* vj = reinterpret_cast<const Vec*>(v + int64_t(j) * kPadded) + d;
      for (int c = 0; c < 4; ++c) {
        a[0][c] += p[j] * vj[c];
        a[1][c] += p[kKeys + j] * vj[c];
      }
    }
    for (int c = 0; c < 4; ++c) o0[d + c] = a[0][c], o1[d + c] = a[1][c];
  }
}

// 2^x for x <= 0, relative error 2e-7; below -126 it is 0, NaN stays. No call, so loops over it vectorise.
inline float exp2_negative(float x) {
  float clamped = x < -126.f ? -126.f : x;
  float rounded = clamped + 12582912.f;        // 1.5 * 2^23: the integer part now sits in the low bits
  float f = clamped - (rounded - 12582912.f);  // [-0.5, 0.5]
  float poly = 1.5403530e-4f;
  poly = poly * f + 1.3333558e-3f;
  poly = poly * f + 9.6181291e-3f;
  poly = poly * f + 5.5504109e-2f;
  poly = poly * f + 2.4022651e-1f;
  poly = poly * f + 6.9314718e-1f;
  poly = poly * f + 1.f;
  float value = float_of(bits_of(poly) + (bits_of(rounded) << 23));
  return x < -126.f ? 0.f : x == x ? value : x;
}

}  // namespace fi::cpu
