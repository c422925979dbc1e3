// Online softmax of the two query rows a thread holds: lane/4 and lane/4 + 8 of its warp's 16.
#pragma once
#include <cfloat>
#include <utility>

#include "../state.h"
#include "smem.cuh"
#include "wgmma.cuh"

namespace fi::sm90 {

// A thread's share of a product of 64 rows and 8 n columns: [n][row][2].
constexpr int kOutputs = kDimVo / 2;
using Output = float[kOutputs];
template <int kTokens>
using Scores = float[kTokens / 2];
template <int kTokens>
using Probabilities = uint32_t[kTokens / 16][4];  // pairs of Element, as the next product wants

using Transform = decltype(transform_of<Variant>(std::declval<const Args&>(), Row{}));

// Of a thread's two rows. Made before scores are awaited: what it looks up would otherwise come after them.
struct Transforms {
  Transform of_row[2];

  __device__ __forceinline__ Transforms(const AttentionParams& p, const Args& args, const Task& t, int first)
      : of_row{transform_of<Variant>(args, t.row(p, t.begin + first)),
               transform_of<Variant>(args, t.row(p, t.begin + first + 8))} {}
};

struct RowState {
  const AttentionParams& p;
  const Args& args;
  const Task* task;
  Transforms transforms;
  int first_row;       // of the tile; the second row is 8 further on
  KeyRange all_rows;   // keys that every row of the warp sees
  bool whole = false;  // plans that skip: all rows see all keys of the tile that comes next
  float max[2];        // log2, what weights are relative to: a row's maximum or up to kSlack below
  float sum[2];        // this thread's share of the row until finish()

  __device__ __forceinline__ RowState(const AttentionParams& params, const Args& variant_args, const Task& t,
                                      int first)
      : RowState(params, variant_args, t, first, Transforms(params, variant_args, t, first)) {}
  __device__ __forceinline__ RowState(const AttentionParams& params, const Args& variant_args, const Task& t,
                                      int first, const Transforms& of_rows)
      : p(params),
        args(variant_args),
        task(&t),
        transforms(of_rows),
        first_row(first),
        all_rows{0, t.kv_len} {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!(Variant::kWholePast && t.scattered())) {
        Row r = row(i);
        KeyRange k = Variant::keys(args, r);
        int seen = ::min(k.end, Variant::seen_before(args, r));
        all_rows = {::max(all_rows.begin, k.begin), ::min(all_rows.end, seen)};
      }
      max[i] = Variant::kSoftmax ? -FLT_MAX : 0.f;  // no key yet; not -inf, minus which -inf would be NaN
      sum[i] = 0.f;
    }
    all_rows = {__reduce_max_sync(~0u, all_rows.begin), __reduce_min_sync(~0u, all_rows.end)};
  }

  __device__ __forceinline__ void take(const float (&max_)[2], const float (&sum_)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) max[i] = max_[i], sum[i] = sum_[i];
  }
  __device__ __forceinline__ void give(float (&max_)[2], float (&sum_)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) max_[i] = max[i], sum_[i] = sum[i];
  }

  __device__ __forceinline__ int packed(int i) const { return task->begin + first_row + 8 * i; }
  // Rows of a prefix are not asked for where all see all of it.
  __device__ __forceinline__ Row row(int i) const {
    return Variant::kWholePast ? task->own_row(p, packed(i)) : task->row(p, packed(i));
  }

  // Scores into weights. token: the first of the scores, in the request. halfway(x) comes between the
  // exponentials, those before it being needed for x. Whether the base of a row of the warp has moved: then
  // what rows have summed so far is to be multiplied by keep.
  template <int kTokens, class Halfway>
  __device__ __forceinline__ bool step(Scores<kTokens>& s, float (&keep)[2], int token, Halfway halfway) {
    transform<kTokens>(s, token);
    if constexpr (!Variant::kSoftmax) {
      halfway(s[0]);
      return false;
    }
    float to_log2 = log2_of_score(), m[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) m[r] = __fmul_rn(largest<kTokens>(s, r, max[r] + kSlack < 0.f), to_log2);
    bool outgrown = __any_sync(~0u, m[0] > max[0] + kSlack || m[1] > max[1] + kSlack);
    if (outgrown) move_bases(m, keep);
    float sums[2][kChains] = {};
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
      if (n == kTokens / 16) halfway(sums[0][0] + sums[1][0]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[4 * n + 2 * r + i];
          x = exp2_approx(fmaf(x, to_log2, -max[r]));
          sums[r][(2 * n + i) % kChains] += x;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] += (sums[r][0] + sums[r][1]) + (sums[r][2] + sums[r][3]);
    return outgrown;
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

  // Row sums over the quad.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
      sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
    }
  }

 private:
  // a logits transform has scaled them
  __device__ __forceinline__ float log2_of_score() const {
    return Variant::kHasLogits ? kLog2e : p.scale * kLog2e;
  }

  // Weights are at most 2^kSlack: a base moves when a score exceeds it by more, so that of most tiles nothing
  // but this thread's own maxima is asked for. 16-bit floats have room above 1, bf16 as much as float32; a
  // bias such as ALiBi's grows from tile to tile.
  static constexpr float kSlack = Variant::kHasLogits && std::is_same_v<Element, __nv_bfloat16> ? 64.f : 8.f;

  __device__ __forceinline__ void move_bases(const float (&own)[2], float (&keep)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float m = fmaxf(own[r], __shfl_xor_sync(~0u, own[r], 1));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
      m = fmaxf(max[r], m);
      keep[r] = exp2_approx(max[r] - m);
      sum[r] *= keep[r];
      max[r] = m;
    }
  }

  // Of this thread's scores of a row, as integers: there is an instruction for the largest of three. Floats
  // are ordered like their bits unless all are negative, when those are ordered the other way round and,
  // unless negative ones matter, any of them will do.
  template <int kTokens>
  __device__ __forceinline__ float largest(const Scores<kTokens>& s, int r, bool negative) const {
    int m = most<kTokens>(s, r, [](int x, int y, int z) { return __vimax3_s32(x, y, z); });
    if (m < 0 && negative)
      m = most<kTokens>(s, r, [](int x, int y, int z) { return int(__vimin3_u32(x, y, z)); });
    return __int_as_float(m);
  }

  // In independent chains: one would take longer than the products beside it.
  static constexpr int kChains = 4;
  template <int kTokens, class Pick>
  __device__ __forceinline__ int most(const Scores<kTokens>& s, int r, Pick pick) const {
    int m[kChains];
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
      int x = __float_as_int(s[4 * n + 2 * r]), y = __float_as_int(s[4 * n + 2 * r + 1]);
      m[n % kChains] = pick(x, y, n < kChains ? y : m[n % kChains]);
    }
    static_assert(kTokens / 8 >= kChains);
    return pick(pick(m[0], m[1], m[2]), m[3], m[3]);
  }

  template <int kTokens>
  __device__ __forceinline__ bool masked(int token) const {
    if (kTileList && whole) return false;
    return token < all_rows.begin || token + kTokens > all_rows.end;
  }

  template <int kTokens>
  __device__ __forceinline__ void transform(Scores<kTokens>& s, int token) {
    bool some_hidden = masked<kTokens>(token);
    int first = token + threadIdx.x % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if constexpr (kTransforms<Variant>) {
#pragma unroll
        for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& x = s[4 * n + 2 * r + i];
            x = transforms.of_row[r](Logit{x, p.scale}, Position{first, 8 * n + i});
          }
      }
      if (some_hidden) {
        Row query = row(r);
        KeyRange k = Variant::keys(args, query);
        auto mask = Variant::mask(args, query);
#pragma unroll
        for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            int t = first + 8 * n + i;
            if (!mask.sees(t) || t < k.begin || t >= k.end) s[4 * n + 2 * r + i] = kHidden<Variant>;
          }
      }
    }
  }
};

}  // namespace fi::sm90
