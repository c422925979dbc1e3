// What lies where in shared memory, who waits for whom, and the kernel's parameters.
#pragma once
#include "../smxx/task.cuh"
#include "ptx.cuh"
#include "traits.cuh"

namespace fi::sm90 {

struct Steps {  // of K, or of V, in 16 bytes; modulo 2^32, as offsets are
  uint32_t page, token;
};

struct Params {
  AttentionParams attention;
  CUtensorMap k, v;    // [pages, kv_heads, page_size, head_dim]; box: box_tokens tokens, a line;
                       // runs: [1, kv_heads, pages * page_size, head_dim]; box: kRunTokens, a line
  CUtensorMap q;       // [1, tokens, q_heads, head_dim]; box: a wide tile's tokens and heads, a line
  int32_t box_tokens;  // 0: TMA cannot read this cache page by page
  int32_t runs;        // 1: but tokens that lie one behind the other
  int32_t q_boxes;     // 1: wide tiles of queries come by TMA
  int32_t page_shift;  // log2 of the page size, -1: it is not a power of two
  Steps k_steps, v_steps;
  int32_t token_boxes;  // composable formats, 1: queries of prefixes come by TMA, token by token
  CUtensorMap q_token;  // likewise: as q; box: one token's heads
};

static_assert(offsetof(Params, k) == 384, "kernels find what follows by its offset");

// The KV tiles of a task that come by TMA. Not those that hold tokens which are not the request's keys or lie
// before all windows: what is read there must be zero, and a box knows no rows.
struct BoxTiles {
  int begin, end;

  __device__ __forceinline__ BoxTiles(const Params& params, const Task& task)
      : begin(task.first_token < task.key_begin), end(params.box_tokens > 0 ? whole_tiles(task) : 0) {}
  __device__ __forceinline__ bool has(int tile) const { return tile >= begin && tile < end; }

 private:
  __device__ __forceinline__ static int whole_tiles(const Task& task) {
    if constexpr (kTileList) {  // all but the last of the request
      int last = task.tiles - 1;
      return last < 0 || task.token_of_tile(last) + kTileKv > task.kv_len ? last : task.tiles;
    }
    return (task.kv_len - task.first_token) / kTileKv;
  }
};

enum NamedBarrier : int {
  kConsumersBarrier = 1,  // both consumer warpgroups
  kTurnBarrier,           // + warpgroup: its turn to issue products
};

struct Control {  // barriers are named by their event
  uint64_t k_full[kKSlots], k_empty[kKSlots], v_full[kVSlots], v_empty[kVSlots];
  uint64_t task_full[kTasks], task_empty[kTasks], q_full[kQStages], q_empty[kQStages];
  Task task[kTasks];
  BoxTiles box_tiles[kTasks];                     // of the task
  int32_t item[kTasks];                           // profiling builds: of the task
  float nowhere;                                  // see before_next_wait
  float2 states[kGroupRows];                      // max and sum of the second warpgroup's rows, narrow tiles
  uint64_t k_landed[kKSlots], v_landed[kVSlots];  // before a transform
};
static_assert(sizeof(Control) <= kControlBytes, "kControlBytes");

// Tile n goes to slot n % kSlots, in round n / kSlots. A barrier tells two rounds apart, not three: whoever
// waits must wait for every tile, in order.
template <int kSlots, int kBytes, bool kTransformed>
struct Ring {
  uint32_t slots, full, empty, landed;

  __device__ Ring(uint32_t place, const uint64_t* full_barriers, const uint64_t* empty_barriers,
                  const uint64_t* landed_barriers)
      : slots(place),
        full(smem_address(full_barriers)),
        empty(smem_address(empty_barriers)),
        landed(kTransformed ? smem_address(landed_barriers) : full) {}

  __device__ __forceinline__ uint32_t slot(uint32_t n) const { return slots + n % kSlots * kBytes; }
  __device__ __forceinline__ uint32_t full_of(uint32_t n) const { return full + n % kSlots * 8; }
  __device__ __forceinline__ uint32_t empty_of(uint32_t n) const { return empty + n % kSlots * 8; }
  // Where loads arrive: that is what consumers await, unless a transform comes between.
  __device__ __forceinline__ uint32_t landed_of(uint32_t n) const { return landed + n % kSlots * 8; }
  __device__ __forceinline__ void wait_landed(uint32_t n) const {
    barrier_wait(landed_of(n), n / kSlots & 1);
  }
  __device__ __forceinline__ void wait_full(uint32_t n) const { barrier_wait(full_of(n), n / kSlots & 1); }
  __device__ __forceinline__ void wait_empty(uint32_t n) const {
    barrier_wait(empty_of(n), n / kSlots & 1 ^ 1);
  }
  __device__ __forceinline__ void init() const {
    for (int n = 0; n < kSlots; ++n) {
      barrier_init(full_of(n), kKvThreads);
      barrier_init(empty_of(n), kConsumerWarps);
      if constexpr (kTransformed) barrier_init(landed_of(n), kKvThreads);
    }
  }
};

struct Smem {
  Control& control;
  Ring<kKSlots, kKBytes, Variant::kHasKey> k;
  Ring<kVSlots, kVBytes, Variant::kHasValue> v;
  uint32_t queries;

  template <bool kOfV>
  __device__ __forceinline__ const auto& ring() const {
    if constexpr (kOfV) {
      return v;
    } else {
      return k;
    }
  }

  __device__ explicit Smem(unsigned char* base)
      : control(*reinterpret_cast<Control*>(base + kRingBytes + kQStages * kQBytes)),
        k(smem_address(base), control.k_full, control.k_empty, control.k_landed),
        v(k.slots + kKSlots * kKBytes, control.v_full, control.v_empty, control.v_landed),
        queries(k.slots + kRingBytes) {}

  // Of item n of the worker.
  __device__ __forceinline__ Task& task(uint32_t n) const { return control.task[n % kTasks]; }
  __device__ __forceinline__ BoxTiles& box_tiles(uint32_t n) const { return control.box_tiles[n % kTasks]; }
  __device__ __forceinline__ int32_t& item(uint32_t n) const { return control.item[n % kTasks]; }
  __device__ __forceinline__ uint32_t q(uint32_t n) const { return queries + n % kQStages * kQBytes; }

  __device__ __forceinline__ uint32_t task_full(uint32_t n) const {
    return smem_address(control.task_full + n % kTasks);
  }
  __device__ __forceinline__ uint32_t task_empty(uint32_t n) const {
    return smem_address(control.task_empty + n % kTasks);
  }
  __device__ __forceinline__ uint32_t q_full(uint32_t n) const {
    return smem_address(control.q_full + n % kQStages);
  }
  __device__ __forceinline__ uint32_t q_empty(uint32_t n) const {
    return smem_address(control.q_empty + n % kQStages);
  }
  __device__ __forceinline__ void wait_task_full(uint32_t n) const {
    barrier_wait(task_full(n), n / kTasks & 1);
  }
  __device__ __forceinline__ void wait_task_empty(uint32_t n) const {
    barrier_wait(task_empty(n), n / kTasks & 1 ^ 1);
  }
  __device__ __forceinline__ void wait_q_full(uint32_t n) const { barrier_wait(q_full(n), n / kQStages & 1); }
  __device__ __forceinline__ void wait_q_empty(uint32_t n) const {
    barrier_wait(q_empty(n), n / kQStages & 1 ^ 1);
  }

  __device__ __forceinline__ void init_barriers() const {
    k.init();
    v.init();
    for (int n = 0; n < kTasks; ++n) {
      barrier_init(task_full(n), 1);
      barrier_init(task_empty(n), kConsumers * kGroupThreads + kKvThreads);
    }
    for (int n = 0; n < kQStages; ++n) {
      barrier_init(q_full(n), 32);
      barrier_init(q_empty(n), kConsumers * kGroupThreads);
    }
    fence_barrier_init();
  }
};

}  // namespace fi::sm90
