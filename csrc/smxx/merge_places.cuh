// Composable formats: joins the partial states that a row has in several nodes, each perhaps split over KV.
// One warp a row. States are joined in the order request, prefixes upwards, keys: results do not depend on
// timing.
#pragma once
#include "merge.cuh"

namespace fi::smxx {

// The partial states of one row: a lane has those of one node.
struct NodeStates {
  int32_t first = 0, slots = 0;  // rows of partial states: of the first piece, and of the second
  int end = 0;                   // pieces of this node and of those before

  NodeStates() = default;
  __device__ __forceinline__ NodeStates(const Levels& levels, const PlanHeader& header, int place,
                                        int kv_head, int head_of_group) {
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
      slots = (levels.first_slot + before.slots() + 1) * kTileQ + row;
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
  __device__ __forceinline__ int32_t row_of(int n, int nodes) const {
    int node = 0, begin = 0;
    for (int i = 0; i < nodes - 1; ++i) {
      int e = __shfl_sync(~0u, end, i);
      if (e <= n) node = i + 1, begin = e;
    }
    int32_t first_row = __shfl_sync(~0u, first, node), slot_row = __shfl_sync(~0u, slots, node);
    return n == begin ? first_row : slot_row + (n - begin - 1) * kTileQ;
  }
};

// Walks the rows of a warp. What the plan says of the next row is read while this one is joined, of the first
// before the partial states need be there.
struct MergePlaces {
  const AttentionParams& p;
  const Levels levels;
  const PlanHeader header;
  const int lane, heads, rows;

  __device__ __forceinline__ explicit MergePlaces(const AttentionParams& params)
      : p(params),
        levels(*p.levels),
        header(*p.header),
        lane(threadIdx.x % 32),
        heads(p.kv_heads * p.group),
        rows(header.places * heads) {}

  template <class Wait>
  __device__ __forceinline__ void run(Wait wait) {
    const Args args = args_of<Args>(p);
    const int step = gridDim.x * kMergeWarps, first = blockIdx.x * kMergeWarps + threadIdx.x / 32;
    NodeStates states;
#pragma unroll 1
    for (int next = first; next - step < rows; next += step) {
      const NodeStates before = states;
      if (next < rows) states = states_of(next);
      if (next == first) {
        wait();
      } else {
        const int row = next - step;
        join(args, before, p.places[row / heads], row % heads);
      }
    }
  }

 private:
  __device__ __forceinline__ NodeStates states_of(int row) const {
    const int head = row % heads;
    return {levels, header, row / heads, head / p.group, head % p.group};
  }

  __device__ __forceinline__ void load(Columns& x, int32_t state) const {
    const float* partial = p.partial_o + int64_t(state) * kDimVo + 4 * lane;
#pragma unroll
    for (int v = 0; v < sizeof(x) / sizeof(float4); ++v)
      if (4 * lane + 128 * v < kDimVo) x[v] = *reinterpret_cast<const float4*>(partial + 128 * v);
  }
  __device__ __forceinline__ static void add(Columns& o, float w, const Columns& x) {
#pragma unroll
    for (int v = 0; v < sizeof(o) / sizeof(float4); ++v)
      o[v] = {o[v].x + w * x[v].x, o[v].y + w * x[v].y, o[v].z + w * x[v].z, o[v].w + w * x[v].w};
  }

  __device__ __forceinline__ void join(const Args& args, const NodeStates& of_row, const Place& at,
                                       int head) const {
    constexpr int kEarly = 2;  // loaded beside the sums that say what they weigh
    Columns o = {};
    float top = -INFINITY, sum = 0.f;
    const int count = of_row.count();
    for (int begin = 0; begin < count; begin += 32) {
      const int pieces = min(32, count - begin);
      const int32_t state = of_row.row_of(begin + lane, levels.count);
      const float lse = lane < pieces ? p.partial_lse[state] : -INFINITY;
      Columns early[kEarly] = {};
#pragma unroll
      for (int i = 0; i < kEarly; ++i)
        if (i < pieces) load(early[i], __shfl_sync(~0u, state, i));
      float most = fmaxf(top, lse);
#pragma unroll
      for (int d = 16; d > 0; d /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
      const float base = most == -INFINITY ? 0.f : most;
      const float keep = exp2f(top - base), weight = exp2f(lse - base);
      top = most;
      sum *= keep;
      for (float4& x : o) x = {x.x * keep, x.y * keep, x.z * keep, x.w * keep};
#pragma unroll
      for (int i = 0; i < kEarly; ++i) {
        const float w = __shfl_sync(~0u, weight, i);  // 0 of those that are not
        sum += w;
        add(o, w, early[i]);
      }
#pragma unroll 4
      for (int i = kEarly; i < pieces; ++i) {
        const float w = __shfl_sync(~0u, weight, i);
        Columns x = {};
        load(x, __shfl_sync(~0u, state, i));
        sum += w;
        add(o, w, x);
      }
    }
    Row row{};  // read by output transforms alone
    if constexpr (Variant::kHasOutput) row = row_of_token(p.batch, at.request, head, at.token);
    write_merged(p, args, row, at.token, head, State{top, sum}, o);
  }
};

// wait: as in merge_rows.
template <class Wait>
__device__ __forceinline__ void merge_places(const AttentionParams& p, Wait wait) {
  if (p.header->places == 0) return;
  MergePlaces(p).run(wait);
}

}  // namespace fi::smxx
