// Batch invariant: a finished chunk of keys joins the state of its piece of work, with the arithmetic of the
// merge; the last chunk of a tile that was not split writes the output.
#pragma once
#include "store.cuh"

namespace fi::sm80 {

__device__ __forceinline__ void join_chunk(const RowState<true>& state, const Output (&o)[kWideFragments]) {
  const AttentionParams& p = state.p;
  const Task& task = state.task;
  int thread = fresh_thread_index(), lane = thread % 32;
  int64_t piece = state_of_piece(p, task.slot, blockIdx.x, kTileQ);
  bool first = task.first_chunk, last = task.slot < 0 && task.last_chunk();
#pragma unroll
  for (int i = 0; i < state.kRows; ++i) {
    int packed = task.begin + state.row_of(i, thread);
    bool exists = packed < task.end;
    int64_t at = piece + packed - task.begin;
    State joined = State::empty();
    if (exists && !first) joined = {p.partial_lse[at], p.partial_sum[at]};
    __syncwarp();  // the row's four lanes have read what one of them writes below
    if (!exists) continue;
    State chunk = State::of<Variant>(state.max[i], state.sum[i]);
    State::Factors factors = joined.join(chunk.lse());
    float inverse = chunk.inverse();
    float* sums = p.partial_o + at * kDimVo + lane % 4 * 2;
    Element* out = nullptr;
    float factor = 0.f;
    if (last) {
      int head = task.head_of(p, packed);
      int64_t row = task.q_first + task.token_of(p, packed);
      factor = joined.finish<Variant>(state.args, head);
      out = static_cast<Element*>(p.out) + row * p.o_token + head * p.o_head + lane % 4 * 2;
      if (p.lse && lane % 4 == 0) p.lse[row * (p.kv_heads * p.group) + head] = joined.lse() * kLn2;
    } else if (lane % 4 == 0) {
      p.partial_lse[at] = joined.max;
      p.partial_sum[at] = joined.sum;
    }
#pragma unroll
    for (int n = 0; n < kDimVo / 8; ++n) {
      float2 sum = first ? make_float2(0.f, 0.f) : *reinterpret_cast<const float2*>(sums + 8 * n);
      const float* values = o[i / 2][n] + i % 2 * 2;
      sum.x = State::joined(sum.x, factors, values[0] * inverse);
      sum.y = State::joined(sum.y, factors, values[1] * inverse);
      if (last) {
        *reinterpret_cast<uint32_t*>(out + 8 * n) =
            output2(state.args, task.row(p, packed), 8 * n + lane % 4 * 2, sum.x * factor, sum.y * factor);
      } else {
        *reinterpret_cast<float2*>(sums + 8 * n) = sum;
      }
    }
  }
}

}  // namespace fi::sm80
