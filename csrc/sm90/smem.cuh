// What lies where in shared memory, who waits for whom, and the kernel's parameters.
#pragma once
#include "../smxx/task.cuh"
#include "ptx.cuh"
#include "traits.cuh"

namespace fi::sm90 {

struct Params {
  AttentionParams attention;
  CUtensorMap k, v;    // [pages, kv_heads, page_size, head_dim]; box: box_tokens tokens, 64 columns
  int32_t box_tokens;  // 0: TMA cannot read this cache
  int32_t page_shift;  // log2 of the page size, -1: it is not a power of two
};

// Whether a KV tile comes by TMA. Not where it holds tokens that are not the request's keys or lie before all
// windows: what is read there must be zero, and a box knows no rows.
__device__ __forceinline__ bool by_boxes(const Params& params, const Task& task, int t) {
  int first = task.first_token + t * kTileKv;
  return params.box_tokens > 0 && first >= task.key_begin && first + kTileKv <= task.kv_len;
}

enum NamedBarrier : int {
  kConsumersBarrier = 1,                      // both consumer warpgroups
  kTurnBarrier,                               // + warpgroup: its turn to issue products
  kGroupBarrier = kTurnBarrier + kConsumers,  // + warpgroup
};

// Barriers by event. Loads are counted; load n goes to slot n % kSlots, in round n / kSlots.
struct Control {
  uint64_t full[kSlots], empty[kSlots];
  uint64_t task_full[kQStages], q_full[kQStages], q_empty[kQStages];
  Task task[kQStages];
  float2 states[kGroupRows];  // max and sum of the second warpgroup's rows, narrow tiles
};
static_assert(sizeof(Control) <= kControlBytes, "kControlBytes");

struct Smem {
  Control& control;
  uint32_t ring, queries;

  __device__ explicit Smem(unsigned char* base)
      : control(*reinterpret_cast<Control*>(base + kSlots * kSlotBytes + kQStages * kQBytes)),
        ring(smem_address(base)),
        queries(ring + kSlots * kSlotBytes) {}

  __device__ __forceinline__ uint32_t slot(uint32_t load) const { return ring + load % kSlots * kSlotBytes; }
  __device__ __forceinline__ uint32_t full(uint32_t load) const {
    return smem_address(control.full) + load % kSlots * 8;
  }
  __device__ __forceinline__ uint32_t empty(uint32_t load) const {
    return smem_address(control.empty) + load % kSlots * 8;
  }
  __device__ __forceinline__ uint32_t q(int stage) const { return queries + stage * kQBytes; }
  __device__ __forceinline__ uint32_t task_full(int stage) const {
    return smem_address(control.task_full + stage);
  }
  __device__ __forceinline__ uint32_t q_full(int stage) const { return smem_address(control.q_full + stage); }
  __device__ __forceinline__ uint32_t q_empty(int stage) const {
    return smem_address(control.q_empty + stage);
  }
  __device__ __forceinline__ Task& task(int stage) const { return control.task[stage]; }

  __device__ __forceinline__ void init_barriers() const {
    for (int i = 0; i < kSlots; ++i) {
      barrier_init(full(i), kKvThreads);
      barrier_init(empty(i), kConsumerWarps);
    }
    for (int i = 0; i < kQStages; ++i) {
      barrier_init(task_full(i), 1);
      barrier_init(q_full(i), 32);
      barrier_init(q_empty(i), kConsumerWarps + kKvThreads / 32);  // the task lies there too
    }
    fence_barrier_init();
  }
};

}  // namespace fi::sm90
