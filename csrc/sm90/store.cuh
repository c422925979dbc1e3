// Finished rows to the output (tile not split) or to the partial state of the item's slot.
#pragma once
#include "../smxx/target.cuh"
#include "softmax.cuh"

namespace fi::sm90 {

__device__ __forceinline__ void store_rows(const RowState& state, const Output& o) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int packed = state.packed(i);
    if (packed >= state.task->end) continue;
    RowTarget target(state.p, state.args, *state.task, packed, state.sum[i], state.max[i], lane % 4 == 0);
#pragma unroll
    for (int n = 0; n < kDimVo / 8; ++n)
      target.store2(8 * n + lane % 4 * 2, o[4 * n + 2 * i], o[4 * n + 2 * i + 1]);
  }
}

// Whole rows of the output through shared memory: 16 bytes a store, whole lines a warp. The warp's 16 rows of
// Q, which nobody reads any more, are the place.
__device__ __forceinline__ void store_whole_rows(const RowState& state, const Output& o, uint32_t q) {
  const Task& task = *state.task;
  const AttentionParams& p = state.p;
  int lane = lane_now();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int packed = state.packed(i), row = state.first_row + 8 * i;
    bool exists = packed < task.end;
    float factor = 0.f;
    if (exists) {
      RowTarget target(p, state.args, task, packed, state.sum[i], state.max[i], lane % 4 == 0);
      factor = target.factor;
    }
#pragma unroll
    for (int n = 0; n < kDimVo / 8; ++n) {
      uint32_t pair = pack2<Element>(o[4 * n + 2 * i] * factor, o[4 * n + 2 * i + 1] * factor);
      uint32_t address = q + chunk_offset<kTileQ>(row, n) + lane % 4 * 4;
      store_shared(address, pair);
    }
  }
  __syncwarp();
  constexpr int kChunks = kDimVo / 8;
  int first = state.first_row - lane / 4;  // of the warp
#pragma unroll
  for (int index = lane; index < 16 * kChunks; index += 32) {
    int row = first + index / kChunks, chunk = index % kChunks, packed = task.begin + row;
    if (packed >= task.end) continue;
    uint4 x = load_shared_16(q + chunk_offset<kTileQ>(row, chunk));
    Element* out = static_cast<Element*>(p.out) + (task.q_first + task.token_of(p, packed)) * p.o_token +
                   task.head_of(p, packed) * p.o_head + chunk * 8;
    *reinterpret_cast<uint4*>(out) = x;
  }
}

// Narrow tiles: the second warpgroup's share of the keys joins the first's, through `values`
// [kOutputs][threads] and smem's states.
__device__ __forceinline__ void give_state(const RowState& state, const Output& o, float* values,
                                           float2* states) {
  int thread = threadIdx.x % kGroupThreads;
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) values[i * kGroupThreads + thread] = o[i];
  if (thread % 4 == 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) states[state.first_row + 8 * i] = make_float2(state.max[i], state.sum[i]);
  }
}

__device__ __forceinline__ void join_state(RowState& state, Output& o, const float* values,
                                           const float2* states) {
  int thread = threadIdx.x % kGroupThreads;
  float own[2], other[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float2 second = states[state.first_row + 8 * i];
    float top = fmaxf(state.max[i], second.x);
    own[i] = exp2_approx(state.max[i] - top);
    other[i] = exp2_approx(second.x - top);
    state.max[i] = top;
    state.sum[i] = state.sum[i] * own[i] + second.y * other[i];
  }
#pragma unroll
  for (int i = 0; i < kOutputs; ++i)
    o[i] = o[i] * own[i / 2 % 2] + values[i * kGroupThreads + thread] * other[i / 2 % 2];
}

}  // namespace fi::sm90
