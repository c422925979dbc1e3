// Online softmax of the query rows a thread holds: rows lane/4 and lane/4 + 8 of each 16-row fragment of its
// warp.
#pragma once
#include "../smxx/task.cuh"
#include "../state.h"
#include "mma.cuh"

namespace fi::sm80 {

template <bool kWide>
struct RowState {
  static constexpr int kRows = kWide ? 2 * kWideFragments : 2;
  const AttentionParams& p;
  const Args& args;
  const Task& task;
  int thread;
  KeyRange all_rows;   // keys that every row of the warp sees
  bool whole = false;  // plans that skip: all rows see all keys of the tile that comes next
  float max[kRows];    // in units of the scores; -inf: no key yet
  float sum[kRows];    // this thread's share of the row until finish()

  // Row of the tile; in a narrow tile all warps have the same rows.
  __device__ __forceinline__ static int row_of(int i, int thread) {
    int warp_row = kWide ? thread / 32 * 16 * kWideFragments : 0;
    return warp_row + i / 2 * 16 + i % 2 * 8 + thread % 32 / 4;
  }

  __device__ __forceinline__ RowState(int thread_index, const AttentionParams& params,
                                      const Args& variant_args, const Task& t)
      : p(params), args(variant_args), task(t), thread(thread_index), all_rows{0, t.kv_len} {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      Row r = row(i);
      KeyRange k = Variant::keys(args, r);
      int seen = ::min(k.end, Variant::seen_before(args, r));
      all_rows = {::max(all_rows.begin, k.begin), ::min(all_rows.end, seen)};
      max[i] = kHidden<Variant>;
      sum[i] = 0.f;
    }
    all_rows = {__reduce_max_sync(~0u, all_rows.begin), __reduce_min_sync(~0u, all_rows.end)};
  }

  // Found again for every tile that needs it: all rows at once would not fit the registers.
  __device__ __forceinline__ Row row(int i) const {
    return task.row(p, forget(task.begin + row_of(i, thread)));
  }

  // Scores of one fragment into probabilities; rescales its o. token: the warp's first token in the request.
  template <int kTokens>
  __device__ __forceinline__ void step(Probabilities<kTokens>& probabilities, Scores<kTokens>& s, Output& o,
                                       int fragment, int token) {
    int first = token + thread % 4 * 2;
    bool masked = token < all_rows.begin || token + kTokens > all_rows.end;
    if constexpr (kTileList) masked &= !whole;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // which two of a thread's four values belong to the row
      if constexpr (kTransforms<Variant>) {
        const auto of_row = transform_of<Variant>(args, row(2 * fragment + half));
#pragma unroll
        for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& x = s[n][2 * half + i];
            x = of_row(Logit{x, p.scale}, Position{first, 8 * n + i});
          }
      }
      if (masked) {
        Row r = row(2 * fragment + half);
        KeyRange k = Variant::keys(args, r);
        auto mask = Variant::mask(args, r);
#pragma unroll
        for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            int t = first + 8 * n + i;
            if (!mask.sees(t) || t < k.begin || t >= k.end) s[n][2 * half + i] = kHidden<Variant>;
          }
      }
      if constexpr (Variant::kSoftmax) step_row<kTokens>(2 * fragment + half, s, o, half);
    }
#pragma unroll
    for (int n = 0; n < kTokens / 16; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* x = s[2 * n + i / 2] + i % 2 * 2;
        probabilities[n][i] = pack2<Element>(x[0], x[1]);
      }
  }

  // Row sums over the quad; max becomes log2.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
      sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
      max[i] *= to_log2();
    }
  }

 private:
  // from units of the scores: a logits transform has scaled them
  __device__ __forceinline__ float to_log2() const { return Variant::kHasLogits ? kLog2e : p.scale * kLog2e; }

  template <int kTokens>
  __device__ __forceinline__ void step_row(int r, Scores<kTokens>& s, Output& o, int half) {
    float m = max[r];
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) m = fmaxf(m, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
    float base = m == -INFINITY ? 0.f : m * to_log2();  // -inf - -inf would be NaN
    // batch invariant: compiled without fused products, so this is 1 where the largest score stays
    float keep = exp2_approx(max[r] * to_log2() - base);
    max[r] = m;
    sum[r] *= keep;
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
      s[n][2 * half] = exp2_approx(fmaf(s[n][2 * half], to_log2(), -base));
      s[n][2 * half + 1] = exp2_approx(fmaf(s[n][2 * half + 1], to_log2(), -base));
      sum[r] += s[n][2 * half] + s[n][2 * half + 1];
    }
#pragma unroll
    for (int n = 0; n < kDimVo / 8; ++n) {
      o[n][2 * half] *= keep;
      o[n][2 * half + 1] *= keep;
    }
  }
};

}  // namespace fi::sm80
