// A variant's arguments as functors read them: the generated struct Args, whose tensors are indexed by [].
#pragma once
#include "variant.h"

namespace fi {

// The first index out of range, in a debug build.
struct Fault {
  int64_t found;  // 0: none
  int64_t argument, index, length;

  FI_HD void report(int64_t argument_, int64_t index_, int64_t length_) {
#if defined(__CUDA_ARCH__)
    bool first = !atomicCAS(reinterpret_cast<unsigned long long*>(&found), 0ull, 1ull);
#else
    bool first = __sync_bool_compare_and_swap(&found, 0, 1);
#endif
    if (first) argument = argument_, index = index_, length = length_;
  }
};

// A tensor of a debug build, where others have a pointer.
template <class T>
struct Checked {
  const T* data;
  int64_t length;
  Fault* fault;
  int64_t argument;  // which of the variant's

  // a call: kernels index in unrolled loops, and inlined it takes the compiler twice as long
  FI_HD_CALL T operator[](int64_t i) const {
    if (i >= 0 && i < length) return data[i];
    fault->report(argument, i, length);
    return T();
  }
};

// The elements of one request's keys. Executors ask for whole tiles of keys, and q_pos may lie below 0: a
// position outside has the nearest key's element.
template <class Data>
struct KeyElements {
  Data data;
  int64_t first;
  int32_t last;

  FI_HD auto operator[](int32_t pos) const {
    pos = pos < last ? pos : last;
    return data[first + (pos > 0 ? pos : 0)];  // last is -1 without keys
  }
};

// A tensor [requests, positions]: name[r][kv_pos] is an element of the row's request.
template <class Data>
struct PerKey {
  Data data;
  int64_t positions;

  FI_HD KeyElements<Data> operator[](const Row& r) const {
    return {data, r.request * positions, r.kv_len - 1};
  }
  FI_HD KeyElements<Data> operator[](const Key& k) const {
    return {data, k.request * positions, k.kv_len - 1};
  }
};

// Those of a debug build lie in memory, and their address here: with lengths they would not fit.
template <class Args>
FI_HD const Args& args_of(const AttentionParams& p) {
  if constexpr (Args::kDebug) {
    return **reinterpret_cast<const Args* const*>(p.variant_args);
  } else {
    static_assert(sizeof(Args) <= kMaxVariantBytes, "too many variant arguments");
    return *reinterpret_cast<const Args*>(p.variant_args);
  }
}

}  // namespace fi
