// Finished rows to the output (tile not split) or to the partial state of the item's slot.
#pragma once
#include "../smxx/target.cuh"
#include "softmax.cuh"

namespace fi::sm80 {

__device__ __forceinline__ void store_wide(const RowState<true>& state, const Output (&o)[kWideFragments]) {
  const Task& task = state.task;
  int thread = fresh_thread_index(), lane = thread % 32;  // nothing of the store lives in a register before
#pragma unroll
  for (int i = 0; i < state.kRows; ++i) {
    int row = task.begin + state.row_of(i, thread);
    if (row >= task.end) continue;
    RowTarget target(state.p, state.args, task, row, state.sum[i], state.max[i], lane % 4 == 0);
#pragma unroll
    for (int n = 0; n < kDimVo / 8; ++n)
      target.store2(8 * n + lane % 4 * 2, o[i / 2][n][i % 2 * 2], o[i / 2][n][i % 2 * 2 + 1]);
  }
}

// Narrow tiles: [kWarps][16] max, the same of sum, then [kWarps][16][kDimVo] o, unnormalised.
__device__ __forceinline__ void exchange_warps(float* exchange, const RowState<false>& state,
                                               const Output (&o)[1]) {
  int thread = fresh_thread_index(), lane = thread % 32;
  float* values = exchange + 2 * kWarps * 16;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int row = thread / 32 * 16 + state.row_of(i, thread);
    if (lane % 4 == 0) {
      exchange[row] = state.max[i];
      exchange[kWarps * 16 + row] = state.sum[i];
    }
#pragma unroll
    for (int n = 0; n < kDimVo / 8; ++n) {
      // rows are kDimVo floats apart: rotate the columns so that the warp's eight rows spread over the banks
      int column = (8 * n + lane % 4 * 2 + lane / 4 * 8) % kDimVo;
      *reinterpret_cast<float2*>(values + row * kDimVo + column) =
          make_float2(o[0][n][2 * i], o[0][n][2 * i + 1]);
    }
  }
  __syncthreads();
}

__device__ __forceinline__ void store_narrow(const AttentionParams& p, const Args& args, const Task& task,
                                             const float* exchange) {
  int thread = fresh_thread_index();
  constexpr int kThreadsPerRow = kThreads / 16;
  int row = thread / kThreadsPerRow, part = thread % kThreadsPerRow;
  if (task.begin + row >= task.end) return;
  const float* values = exchange + 2 * kWarps * 16;
  float top = -INFINITY;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) top = fmaxf(top, exchange[w * 16 + row]);
  float weight[kWarps], sum = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    float max = exchange[w * 16 + row];
    weight[w] = max == -INFINITY ? 0.f : exp2_approx(max - top);
    sum += weight[w] * exchange[(kWarps + w) * 16 + row];
  }
  RowTarget target(p, args, task, task.begin + row, sum, top, part == 0);
#pragma unroll 4
  for (int c = 2 * part; c < kDimVo; c += 2 * kThreadsPerRow) {
    float x = 0.f, y = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      int column = (c + row % 8 * 8) % kDimVo;
      float2 o = *reinterpret_cast<const float2*>(values + (w * 16 + row) * kDimVo + column);
      x += weight[w] * o.x;
      y += weight[w] * o.y;
    }
    target.store2(c, x, y);
  }
}

}  // namespace fi::sm80
