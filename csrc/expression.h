// What expressions of fi_backend/expressions.py call. On a GPU without the branches of the exact functions,
// which would cost a kernel its registers; relative errors below 1e-5 for moderate arguments.
#pragma once
#include "variant.h"

#if !defined(__CUDACC__)
#include <cmath>
#endif

namespace fi::expression {

// towards minus infinity, as in Python; b is not 0
FI_HD int32_t floor_quotient(int32_t a, int32_t b) { return a / b - (a % b != 0 && (a % b < 0) != (b < 0)); }
FI_HD int32_t floor_remainder(int32_t a, int32_t b) { return a - floor_quotient(a, b) * b; }

// an integer as a float
template <class T>
FI_HD float number(T x) {
  return float(x);
}
FI_HD Distance number(Position p) { return p.distance(); }

#if defined(__CUDA_ARCH__)
FI_HD float quotient(float a, float b) { return __fdividef(a, b); }
FI_HD Logit quotient(Logit a, float b) { return a * __fdividef(1.f, b); }
FI_HD float exp(float x) { return exp2_on_gpu(x * kLog2e); }
FI_HD float log(float x) { return __logf(x); }
FI_HD float sqrt(float x) { return __fsqrt_rn(x); }
// at the ends exp is 0 or inf
template <class X>
FI_HD float tanh(X x) {
  return 1.f - 2.f * inverse_on_gpu(1.f + exp2_on_gpu(x * (2.f * kLog2e)));
}
#else
FI_HD float quotient(float a, float b) { return a / b; }
FI_HD float exp(float x) { return expf(x); }
FI_HD float log(float x) { return logf(x); }
FI_HD float sqrt(float x) { return sqrtf(x); }
FI_HD float tanh(float x) { return tanhf(x); }
#endif
template <class X>
FI_HD float sigmoid(X x) {
  return fi::sigmoid(x);
}

}  // namespace fi::expression
