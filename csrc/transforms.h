// Transforms of queries and keys: rotary position embedding, from a cache of keys that are not rotated, and
// normalisation.
#pragma once
#include "variant.h"

#if !defined(__CUDACC__)
#include <cmath>
#endif

namespace fi {

// Whole turns cancel when they are counted modulo 2^32, so that the angle of a late position is as exact as
// that of an early one.
struct Rotation {
  float sine, cosine;

  // turns: a position's share of a turn, times 2^32
  FI_HD Rotation(int32_t position, int32_t turns) {
    float angle = float(int32_t(uint32_t(position) * uint32_t(turns))) * 1.46291808e-9f;  // 2 pi / 2^32
#if defined(__CUDA_ARCH__)
    __sincosf(angle, &sine, &cosine);  // within 2^-21 from -pi to pi
#else
    sine = sinf(angle), cosine = cosf(angle);
#endif
  }
};

// Of each head the first kRotary elements; 0: all. Element i is paired with the one half of them further on
// (NeoX) or, kInterleaved, with its neighbour.
template <int kRotary, bool kInterleaved>
struct Rope : Feature {
  static constexpr bool kHasQuery = true, kHasKey = true;
  template <class A, class X>
  FI_HD static auto query(const A& a, X x, const Row& r) {
    return rotated(a, x, r.q_pos);
  }
  template <class A, class X>
  FI_HD static auto key(const A& a, X x, const Key& k) {
    return rotated(a, x, k.kv_pos);
  }

 private:
  template <class A, class X>
  FI_HD static auto rotated(const A& a, X x, int32_t position) {
    constexpr int kWidth = kRotary ? kRotary : X::kDim;
    constexpr bool kAll = kWidth == X::kDim;
    static_assert(kWidth <= X::kDim && kWidth % 2 == 0, "ROPE_n takes an even n of at most head_dim");
    const auto turns = a.rope_turns;
    return mapped(x, [=](Dim d) {
      if (!kAll && d >= kWidth) return x[d];
      constexpr int kApart = kInterleaved ? 1 : kWidth / 2;
      const bool second = kInterleaved ? d.step % 2 : kAll ? d.step >= kApart : d >= kApart;
      const Dim partner = second ? d.down(kApart) : d.up(kApart), first = second ? partner : d;
      const Rotation at(position, turns[kInterleaved ? first / 2 : int32_t(first)]);
      return x[d] * at.cosine + x[partner] * (second ? at.sine : -at.sine);
    });
  }
};

// Divided by the root mean square, times a weight for each element (QK norm).
struct QkNorm : Feature {
  static constexpr bool kHasQuery = true, kHasKey = true;
  template <class A, class X>
  FI_HD static auto query(const A& a, X x, const Row&) {
    return normalised(x, a.q_norm, a.norm_epsilon);
  }
  template <class A, class X>
  FI_HD static auto key(const A& a, X x, const Key&) {
    return normalised(x, a.k_norm, a.norm_epsilon);
  }

 private:
  template <class X, class Weights>
  FI_HD static auto normalised(X x, Weights weights, float epsilon) {
    const float mean = x.sum([=](Dim d) { return x[d] * x[d]; }) * (1.f / X::kDim);
    const float factor = 1.f / sqrtf(mean + epsilon);
    return mapped(x, [=](Dim d) { return x[d] * factor * weights[d]; });
  }
};

}  // namespace fi
