// Joins the partial states of tiles that were split over KV, in slot order, so that results do not depend on
// timing. One block a merge entry, one warp a row.
#pragma once
#include "../arguments.h"
#include "../state.h"
#include "spec.cuh"

namespace fi::smxx {

// Composable formats have many rows to join: as many warps as the registers permit.
constexpr int kMergeWarps = !kLevels ? 8 : kDimVo <= 128 ? 32 : 16;
constexpr int kMergeResidents = kLevels ? 1 : 2;  // blocks of a multiprocessor
constexpr int kMergeUnroll = kLevels ? 4 : 8;     // fits the registers

// A batch beyond the planner's capacity has no items. Without synchronising nobody can be told, so every
// output becomes NaN: it shows where a stale or empty row would pass for an answer.
__device__ void fill_with_nan(const AttentionParams& p) {
  int64_t heads = int64_t(p.kv_heads) * p.group, rows = p.tokens * heads;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    Element* out = static_cast<Element*>(p.out) + row / heads * p.o_token + row % heads * p.o_head;
    for (int i = threadIdx.x; i < kDimVo; i += blockDim.x) out[i] = Element(NAN);
    if (p.lse && threadIdx.x == 0) p.lse[row] = NAN;
  }
}

// The columns of o that a lane has: 4 lane to 4 lane + 3, and 128 further on.
using Columns = float4[(kDimVo + 127) / 128];

// The states of one row in slots [begin, end). Slots beyond 32 are taken in rounds of 32, the running state
// carried along.
__device__ __forceinline__ State weigh_states(const AttentionParams& p, int begin, int end, int row,
                                              Columns& o) {
  int lane = threadIdx.x % 32;
  float top = -INFINITY, sum = 0.f;
  for (int first = begin; first < end; first += 32) {
    int count = min(32, end - first);
    int64_t state = int64_t(first) * p.partial_rows + row;
    float lse = lane < count ? p.partial_lse[state + lane * p.partial_rows] : -INFINITY;
    float round_top = lse;
#pragma unroll
    for (int d = 16; d > 0; d /= 2) round_top = fmaxf(round_top, __shfl_xor_sync(~0u, round_top, d));
    float new_top = fmaxf(top, round_top);
    float base = new_top == -INFINITY ? 0.f : new_top;
    float keep = exp2f(top - base), weight = exp2f(lse - base);
    top = new_top;
    sum *= keep;
    for (float4& x : o) x = {x.x * keep, x.y * keep, x.z * keep, x.w * keep};
    const float* partial = p.partial_o + state * kDimVo + 4 * lane;
#pragma unroll kMergeUnroll
    for (int i = 0; i < count; ++i) {
      float w = __shfl_sync(~0u, weight, i);
      sum += w;
#pragma unroll
      for (int v = 0; v < sizeof(o) / sizeof(float4); ++v) {
        if (4 * lane + 128 * v >= kDimVo) continue;
        float4 x = *reinterpret_cast<const float4*>(partial + int64_t(i) * p.partial_rows * kDimVo + 128 * v);
        o[v] = {o[v].x + w * x.x, o[v].y + w * x.y, o[v].z + w * x.z, o[v].w + w * x.w};
      }
    }
  }
  return {top, sum};
}

// Batch invariant: one after the other, as chunks join in the kernel.
__device__ __forceinline__ State join_states(const AttentionParams& p, int begin, int end, int row,
                                             Columns& o) {
  int lane = threadIdx.x % 32;
  State state = State::empty();
#pragma unroll 4
  for (int slot = begin; slot < end; ++slot) {
    int64_t at = int64_t(slot) * p.partial_rows + row;
    State::Factors f = state.join(p.partial_lse[at], p.partial_sum[at]);
#pragma unroll
    for (int v = 0; v < sizeof(o) / sizeof(float4); ++v) {
      int column = 4 * lane + 128 * v;
      if (column >= kDimVo) continue;
      float4 x = *reinterpret_cast<const float4*>(p.partial_o + at * kDimVo + column);
      o[v] = {State::joined(o[v].x, f, x.x), State::joined(o[v].y, f, x.y), State::joined(o[v].z, f, x.z),
              State::joined(o[v].w, f, x.w)};
    }
  }
  return state;
}

// The row of one query head, its states joined.
__device__ __forceinline__ void write_merged(const AttentionParams& p, const Args& args, const Row& row,
                                             int64_t q_token, int head, State joined, const Columns& o) {
  int lane = threadIdx.x % 32;
  float factor = joined.finish<Variant>(args, head);
  if (p.lse && lane == 0) p.lse[q_token * (p.kv_heads * p.group) + head] = joined.lse() * kLn2;
  Element* out = static_cast<Element*>(p.out) + q_token * p.o_token + head * p.o_head;
#pragma unroll
  for (int v = 0; v < sizeof(o) / sizeof(float4); ++v) {
    int column = 4 * lane + 128 * v;
    if (column >= kDimVo) continue;
    out[column] = Element(Variant::output(args, o[v].x * factor, row, column));
    out[column + 1] = Element(Variant::output(args, o[v].y * factor, row, column + 1));
    out[column + 2] = Element(Variant::output(args, o[v].z * factor, row, column + 2));
    out[column + 3] = Element(Variant::output(args, o[v].w * factor, row, column + 3));
  }
}

// wait: returns when the partial states are there; what the plan says is read before.
template <class Wait>
__device__ __forceinline__ void merge_rows(const AttentionParams& p, Wait wait) {
  Args args = args_of<Args>(p);
  int merges = p.header->merges;
  bool failed = p.header->error, waited = false;
  for (int m = blockIdx.x; m < merges; m += gridDim.x) {
    WorkItem item = p.merges[m];
    if (kLevels && item.request < 0) continue;  // merge_places joins these
    int q_first = p.batch.qo_indptr[item.request];
    int q_len = p.batch.qo_indptr[item.request + 1] - q_first;
    int tile_rows = item.flags & kWideTile ? kTileQ : kTiles.q_narrow;
    int row_end = min(q_len * p.group, item.row_begin + tile_rows);
    if (!waited) wait();
    waited = true;
    if (threadIdx.x == 0) ItemTimer<kProfile>::start(p, p.header->items + m);
    for (int packed = item.row_begin + threadIdx.x / 32; packed < row_end; packed += kMergeWarps) {
      Columns o = {};
      int begin = item.kv_begin, end = item.kv_end, row_of_tile = packed - item.row_begin;
      State joined = kBatchInvariant ? join_states(p, begin, end, row_of_tile, o)
                                     : weigh_states(p, begin, end, row_of_tile, o);
      int token = packed / p.group, head = item.kv_head * p.group + packed - token * p.group;
      Row row{};  // read by output transforms alone
      if constexpr (Variant::kHasOutput) {
        int kv_len = p.batch.kv_len[item.request];
        row = {item.request, head, kv_len - q_len + token, kv_len, q_len, q_first + token};
      }
      write_merged(p, args, row, q_first + token, head, joined, o);
    }
    if constexpr (kProfile) __syncthreads();  // the last warp is done
    if (threadIdx.x == 0) ItemTimer<kProfile>::stop(p, p.header->items + m);
  }
  if (!waited) wait();  // the end of this kernel must mean the end of the one before
  if (failed) fill_with_nan(p);
}

}  // namespace fi::smxx
