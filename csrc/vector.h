// A head's vector as query, key and value transforms see it, whoever holds it: x[d], and
// x.sum(f) = f(0) + f(1) + ... + f(kDim - 1), which all threads that share the vector ask for together.
#pragma once
#include "params.h"

namespace fi {

// Element first + step of a vector of kDim. Executors know steps when they compile; those below kDim / 2 are
// of the vector's first half, and `first` is a multiple of 8.
struct Dim {
  int32_t first, step;

  FI_HD operator int32_t() const { return first + step; }
  FI_HD Dim up(int32_t n) const { return {first, step + n}; }
  FI_HD Dim down(int32_t n) const { return {first, step - n}; }
};

// f(d) in place of x[d].
template <class X, class F>
struct Mapped {
  static constexpr int kDim = X::kDim;
  X x;
  F f;

  FI_HD float operator[](Dim d) const { return f(d); }
  template <class G>
  FI_HD float sum(G g) const {
    return x.sum(g);
  }
};
template <class X, class F>
FI_HD Mapped<X, F> mapped(X x, F f) {
  return {x, f};
}

}  // namespace fi
