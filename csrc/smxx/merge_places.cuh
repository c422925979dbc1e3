// Composable formats: joins the partial states that a row has in several nodes, each perhaps split over KV.
// One warp a row. States are joined in the order request, prefixes upwards, keys: results do not depend on
// timing.
#pragma once
#include "merge.cuh"

namespace fi::smxx {

// The partial states of one row: a lane has those of one node.
struct NodeStates {
  int64_t first = 0, slots = 0;  // rows of partial states: of the first piece, and of the second
  int end = 0;                   // pieces of this node and of those before

  __device__ NodeStates(const Levels& levels, const PlanHeader& header, int place, int kv_head,
                        int head_of_group) {
    int lane = threadIdx.x % 32, pieces = 0;
    Part part{-1, 0};
    if (lane < levels.count) part = levels.parts[place * levels.count + lane];
    if (part.segment >= 0) {
      int width = part.row & 1 ? kTileQ : kTiles.q_narrow, packed = part.row / 2 + head_of_group;
      int segment = part.segment + packed / width, row = packed % width;
      int unit = kv_head * header.segments + segment;
      CutCount before{levels.unit_cuts[unit]}, after{levels.unit_cuts[unit + 1]};
      pieces = 1 + after.cuts() - before.cuts();
      first = kv_head * header.state_rows + levels.segment_rows[segment] + row;
      slots = int64_t(levels.first_slot + before.slots() + 1) * kTileQ + row;
    }
    end = pieces;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      int below = __shfl_up_sync(~0u, end, d);
      if (lane >= d) end += below;
    }
  }

  __device__ __forceinline__ int count() const { return __shfl_sync(~0u, end, 31); }

  // The row of piece n's state; all lanes ask, each for its own.
  __device__ __forceinline__ int64_t row_of(int n, int nodes) const {
    int node = 0, begin = 0;
    for (int i = 0; i < nodes - 1; ++i) {
      int e = __shfl_sync(~0u, end, i);
      if (e <= n) node = i + 1, begin = e;
    }
    int64_t first_row = __shfl_sync(~0u, first, node), slot_row = __shfl_sync(~0u, slots, node);
    return n == begin ? first_row : slot_row + int64_t(n - begin - 1) * kTileQ;
  }
};

__device__ __forceinline__ void merge_places(const AttentionParams& p) {
  const Args args = args_of<Args>(p);
  const Levels levels = *p.levels;
  const PlanHeader header = *p.header;
  const int lane = threadIdx.x % 32, heads = p.kv_heads * p.group;
  const int rows = header.error ? 0 : levels.tree.header->tokens * heads;
  for (int n = blockIdx.x * kMergeWarps + threadIdx.x / 32; n < rows; n += gridDim.x * kMergeWarps) {
    const int place = n / heads, head = n % heads;
    NodeStates states(levels, header, place, head / p.group, head % p.group);
    const Place at = levels.tree.places[place];
    Columns o = {};
    float top = -INFINITY, sum = 0.f;
    const int count = states.count();
    for (int begin = 0; begin < count; begin += 32) {
      const int pieces = min(32, count - begin);
      const int64_t state = states.row_of(begin + lane, levels.count);
      const float lse = lane < pieces ? p.partial_lse[state] : -INFINITY;
      float most = fmaxf(top, lse);
#pragma unroll
      for (int d = 16; d > 0; d /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
      const float base = most == -INFINITY ? 0.f : most;
      const float keep = exp2f(top - base), weight = exp2f(lse - base);
      top = most;
      sum *= keep;
      for (float4& x : o) x = {x.x * keep, x.y * keep, x.z * keep, x.w * keep};
#pragma unroll 4
      for (int i = 0; i < pieces; ++i) {
        const float w = __shfl_sync(~0u, weight, i);
        const float* partial = p.partial_o + __shfl_sync(~0u, state, i) * kDimVo + 4 * lane;
        sum += w;
#pragma unroll
        for (int v = 0; v < sizeof(o) / sizeof(float4); ++v) {
          if (4 * lane + 128 * v >= kDimVo) continue;
          const float4 x = *reinterpret_cast<const float4*>(partial + 128 * v);
          o[v] = {o[v].x + w * x.x, o[v].y + w * x.y, o[v].z + w * x.z, o[v].w + w * x.w};
        }
      }
    }
    Row row{};  // read by output transforms alone
    if constexpr (Variant::kHasOutput) row = row_of_token(p.batch, at.request, head, at.token);
    write_merged(p, args, row, at.token, head, State{top, sum}, o);
  }
}

}  // namespace fi::smxx
