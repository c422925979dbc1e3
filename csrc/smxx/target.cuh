// Finished rows to the output (tile not split) or to the partial state of the item's slot.
#pragma once
#include "../state.h"
#include "task.cuh"

namespace fi::smxx {

// Of a finished row, two columns.
__device__ __forceinline__ uint32_t output2(const Args& args, const Row& row, int column, float x, float y) {
  return pack2<Element>(Variant::output(args, x, row, column), Variant::output(args, y, row, column + 1));
}

// Where one packed row goes; it is finished when no merge follows.
struct RowTarget {
  const Args& args;
  Row row;  // read by output transforms alone
  float factor;
  Element* out;    // null: partial state
  float* partial;  // fp32, normalised

  __device__ RowTarget(const AttentionParams& p, const Args& args, const Task& task, int packed, float sum,
                       float max_log2, bool leader)
      : args(args), row(task.row(p, packed)) {
    State row_state = State::of<Variant>(max_log2, sum);
    if (task.slot >= 0) {
      int64_t state = (kLevels ? task.slot : int64_t(task.slot) * p.partial_rows) + packed - task.begin;
      out = nullptr;
      partial = p.partial_o + state * kDimVo;
      if (leader) p.partial_lse[state] = row_state.lse();
      factor = row_state.inverse();
    } else {
      int head = task.head_of(p, packed);
      int64_t token = task.q_first + task.token_of(p, packed);
      factor = row_state.finish<Variant>(args, head);
      out = static_cast<Element*>(p.out) + token * p.o_token + head * p.o_head;
      partial = nullptr;
      if (leader && p.lse) p.lse[token * (p.kv_heads * p.group) + head] = row_state.lse() * kLn2;
    }
  }

  __device__ __forceinline__ void store2(int column, float x, float y) const {
    if (out) {
      *reinterpret_cast<uint32_t*>(out + column) = output2(args, row, column, x * factor, y * factor);
    } else {
      *reinterpret_cast<float2*>(partial + column) = make_float2(x * factor, y * factor);
    }
  }
};

}  // namespace fi::smxx
