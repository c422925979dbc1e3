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

// Words of four neighbouring lanes: word k of lane j becomes word j of lane k.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4], int lane) {
  bool odd = lane & 1, high = lane & 2;
#pragma unroll
  for (int k = 0; k < 4; k += 2) {
    uint32_t got = __shfl_xor_sync(~0u, odd ? x[k] : x[k + 1], 1);
    (odd ? x[k] : x[k + 1]) = got;
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    uint32_t got = __shfl_xor_sync(~0u, high ? x[k] : x[k + 2], 2);
    (high ? x[k] : x[k + 2]) = got;
  }
}

// Whole rows of the output, 16 bytes a store: the lanes of a quad have two columns in eight each, of 32
// columns, and swap until each has eight that lie together.
__device__ __forceinline__ void store_whole_rows(const RowState& state, const Output& o) {
  constexpr int kChunks = kDimVo / 8;
  int lane = lane_now();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int packed = state.packed(i);
    bool exists = packed < state.task->end;
    const Row row = state.row(i);
    float factor = 0.f;
    Element* out = nullptr;
    if (exists) {
      RowTarget target(state.p, state.args, *state.task, packed, state.sum[i], state.max[i], lane % 4 == 0);
      factor = target.factor;
      out = target.out;
    }
#pragma unroll
    for (int first = 0; first < kChunks; first += 4) {
      uint32_t x[4] = {};
#pragma unroll
      for (int k = 0; k < 4 && first + k < kChunks; ++k) {
        int n = first + k;
        x[k] = output2(state.args, row, 8 * n + lane % 4 * 2, o[4 * n + 2 * i] * factor,
                       o[4 * n + 2 * i + 1] * factor);
      }
      transpose_quad(x, lane);
      int chunk = first + lane % 4;
      if (exists && chunk < kChunks) *reinterpret_cast<uint4*>(out + 8 * chunk) = {x[0], x[1], x[2], x[3]};
    }
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
