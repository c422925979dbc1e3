// Polynomials of csrc/variant.h that GPUs compute with, for a test of their whole range.
#include "variant.h"

extern "C" void short_tanh(const float* x, float* y, int n) {
  for (int i = 0; i < n; ++i) y[i] = fi::short_tanh(x[i]);
}
extern "C" void short_inverse(const float* x, float* y, int n) {
  for (int i = 0; i < n; ++i) y[i] = fi::short_inverse(x[i]);
}
extern "C" float largest_short_tanh() { return fi::kShortTanh; }
