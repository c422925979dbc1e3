// A variant's arguments as functors read them: the generated struct Args, whose tensors are indexed by [].
#pragma once
#include "variant.h"

namespace fi {

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
};

template <class Args>
FI_HD const Args& args_of(const AttentionParams& p) {
  static_assert(sizeof(Args) <= kMaxVariantBytes, "too many variant arguments");
  return *reinterpret_cast<const Args*>(p.variant_args);
}

}  // namespace fi
