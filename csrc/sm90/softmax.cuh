// Online softmax of the two query rows a thread holds: lane/4 and lane/4 + 8 of its warp's 16.
#pragma once
#include "../state.h"
#include "smem.cuh"

namespace fi::sm90 {

// A thread's share of a product of 64 rows and 8 n columns: [n][row][2].
constexpr int kOutputs = kDimVo / 2;
using Output = float[kOutputs];
template <int kTokens>
using Scores = float[kTokens / 2];
template <int kTokens>
using Probabilities = uint32_t[kTokens / 16][4];  // pairs of Element, as the next product wants

struct RowState {
  const AttentionParams& p;
  const Args& args;
  const Task& task;
  int first_row;      // of the tile; the second row is 8 further on
  KeyRange all_rows;  // keys that every row of the warp sees
  float max[2];       // in units of the scores; -inf: no key yet
  float sum[2];       // this thread's share of the row until finish()

  __device__ __forceinline__ RowState(const AttentionParams& params, const Args& variant_args, const Task& t,
                                      int first)
      : p(params), args(variant_args), task(t), first_row(first), all_rows{0, t.kv_len} {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Row r = row(i);
      KeyRange k = Variant::keys(args, r);
      int seen = ::min(k.end, Variant::seen_before(args, r));
      all_rows = {::max(all_rows.begin, k.begin), ::min(all_rows.end, seen)};
      max[i] = -INFINITY;
      sum[i] = 0.f;
    }
    all_rows = {__reduce_max_sync(~0u, all_rows.begin), __reduce_min_sync(~0u, all_rows.end)};
  }

  __device__ __forceinline__ int packed(int i) const { return task.begin + first_row + 8 * i; }
  __device__ __forceinline__ Row row(int i) const { return task.row(p, packed(i)); }

  // Scores of one of the two rows into weights. keep: what its sums so far are to be multiplied by. token:
  // the first of the scores, in the request.
  template <int kTokens, int kRow>
  __device__ __forceinline__ void step(Scores<kTokens>& s, float& keep, int token) {
    int first = token + threadIdx.x % 4 * 2;
    if constexpr (Variant::kHasLogits) {
      Row r = row(kRow);
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[4 * n + 2 * kRow + i];
          x = kLog2e * Variant::logits(args, x * p.scale, r, first + 8 * n + i);
        }
    }
    if (token < all_rows.begin || token + kTokens > all_rows.end) {
      Row r = row(kRow);
      KeyRange k = Variant::keys(args, r);
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          int t = first + 8 * n + i;
          bool seen = Variant::sees(args, r, t);  // before the range: one load a row, not one a key
          if (!seen || t < k.begin || t >= k.end) s[4 * n + 2 * kRow + i] = -INFINITY;
        }
    }
    step_row<kTokens>(s, keep, kRow);
  }

  __device__ __forceinline__ static void rescale(Output& o, const float (&keep)[2]) {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) o[i] *= keep[i / 2 % 2];
  }

  template <int kTokens>
  __device__ __forceinline__ static void pack(Probabilities<kTokens>& to, const Scores<kTokens>& s) {
#pragma unroll
    for (int n = 0; n < kTokens / 16; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) to[n][i] = pack2<Element>(s[8 * n + 2 * i], s[8 * n + 2 * i + 1]);
  }

  // Row sums over the quad; max becomes log2.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
      sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
      max[i] *= to_log2();
    }
  }

 private:
  // from units of the scores: a logits transform leaves log2
  __device__ __forceinline__ float to_log2() const { return Variant::kHasLogits ? 1.f : p.scale * kLog2e; }

  template <int kTokens>
  __device__ __forceinline__ void step_row(Scores<kTokens>& s, float& keep, int r) {
    float m = max[r];
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) m = fmaxf(m, fmaxf(s[4 * n + 2 * r], s[4 * n + 2 * r + 1]));
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
    float base = m == -INFINITY ? 0.f : m * to_log2();  // -inf - -inf would be NaN
    keep = exp2_approx(max[r] * to_log2() - base);
    max[r] = m;
    sum[r] *= keep;
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
      float& x = s[4 * n + 2 * r];
      float& y = s[4 * n + 2 * r + 1];
      x = exp2_approx(fmaf(x, to_log2(), -base));
      y = exp2_approx(fmaf(y, to_log2(), -base));
      sum[r] += x + y;
    }
  }
};

}  // namespace fi::sm90
