// Online softmax of the two query rows a thread holds (rows lane/4 and lane/4 + 8 of its warp's 16).
#pragma once
#include "../state.h"
#include "traits.cuh"

namespace fi::sm80 {

struct RowState {
  Row row[2];
  KeyRange keys[2];   // clamped to [0, kv_len]
  KeyRange all_rows;  // keys that every row of the warp sees
  float max[2];       // in units of the scores; -inf: no key yet
  float sum[2];       // this thread's share of the row until finish()

  __device__ __forceinline__ void begin(const Args& args, int request, int kv_len, int q_len, int group, int kv_head,
                                        int warp_row, int row_end) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int packed = min(warp_row + lane / 4 + 8 * i, row_end - 1);
      int token = packed / group;
      row[i] = {request, kv_head * group + packed - token * group, kv_len - q_len + token, kv_len};
      KeyRange k = Variant::keys(args, row[i]);
      keys[i] = {max_int(k.begin, 0), min_int(k.end, kv_len)};
      max[i] = -INFINITY;
      sum[i] = 0.f;
    }
    all_rows = {__reduce_max_sync(~0u, max_int(keys[0].begin, keys[1].begin)),
                __reduce_min_sync(~0u, min_int(keys[0].end, keys[1].end))};
  }

  // Turns scores into probabilities in place, rescales o. token: the warp's first token in the request.
  template <int kTokens>
  __device__ __forceinline__ void step(float (&s)[kTokens / 8][4], float (&o)[kDimVo / 8][4], const Args& args,
                                       float scale, int token) {
    float to_log2 = scale * kLog2e;
    int first = token + threadIdx.x % 4 * 2;
    if constexpr (Variant::kHasLogits) {
      to_log2 = 1.f;
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          s[n][i] = kLog2e * Variant::logits(args, s[n][i] * scale, row[i / 2], first + 8 * n + i % 2);
    }
    if (token < all_rows.begin || token + kTokens > all_rows.end) {
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int t = first + 8 * n + i % 2;
          if (t < keys[i / 2].begin || t >= keys[i / 2].end) s[n][i] = -INFINITY;
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float m = max[i];
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) m = fmaxf(m, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
      float base = m == -INFINITY ? 0.f : m * to_log2;  // -inf - -inf would be NaN
      float keep = exp2_approx(max[i] * to_log2 - base);
      max[i] = m;
      sum[i] *= keep;
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) {
        s[n][2 * i] = exp2_approx(s[n][2 * i] * to_log2 - base);
        s[n][2 * i + 1] = exp2_approx(s[n][2 * i + 1] * to_log2 - base);
        sum[i] += s[n][2 * i] + s[n][2 * i + 1];
      }
#pragma unroll
      for (int n = 0; n < kDimVo / 8; ++n) {
        o[n][2 * i] *= keep;
        o[n][2 * i + 1] *= keep;
      }
    }
  }

  // Row sums over the quad; max becomes log2.
  __device__ __forceinline__ void finish(float scale) {
    float to_log2 = Variant::kHasLogits ? 1.f : scale * kLog2e;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
      sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
      max[i] *= to_log2;
    }
  }

 private:
  __device__ static int max_int(int a, int b) { return a > b ? a : b; }
  __device__ static int min_int(int a, int b) { return a < b ? a : b; }
};

}  // namespace fi::sm80
