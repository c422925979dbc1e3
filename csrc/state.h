// Partial attention states and how they join. A state is (o, lse): o normalised over its own keys, lse in log2.
// The empty state is (0, -inf). Shared by every executor, so that the merge means the same thing everywhere.
#pragma once
#include "params.h"

#include <math.h>

namespace fi {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Factor for an unnormalised row and the LSE (log2) of its keys.
struct RowFinish {
  float factor;
  float lse;
};

FI_HD float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  return __fdividef(1.f, x);  // the exact one is a call, and a call spills
#else
  return 1.f / x;
#endif
}

// sum = sum of exp2(x - max) over the row's keys; max = -inf and sum = 0 without keys.
FI_HD RowFinish finish_row(float sum, float max) {
  if (!(sum > 0.f)) return {0.f, -INFINITY};
  return {reciprocal(sum), max + log2f(sum)};
}

// A sink is a key without a value: it enlarges the denominator of a finished row. sink in natural units.
FI_HD RowFinish add_sink(float lse, float sink) {
  float s = sink * kLog2e;
  float top = lse > s ? lse : s;
  float joined = top + log2f(exp2f(lse - top) + exp2f(s - top));
  return {exp2f(lse - joined), joined};
}

}  // namespace fi
