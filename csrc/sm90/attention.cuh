// The persistent kernel: each CTA is a worker and walks its items. One warpgroup loads, two compute.
//
// A wide tile gives each consumer warpgroup 64 of 128 rows and all KV tiles; they take turns in issuing
// products, so that the softmax of one runs beside the products of the other. A narrow tile, at most 64 rows,
// gives both the same rows and half the tokens of each KV tile; their states meet in shared memory at the
// end. So every KV tile is awaited by both, in order: a barrier tells two rounds apart, not three.
//
// Of a wide tile, a warpgroup computes the scores of a KV tile together with the output of the one before.
#pragma once
#include "load.cuh"
#include "mma.cuh"
#include "store.cuh"

namespace fi::sm90 {

struct Consumer {
  const AttentionParams& p;
  const Args& args;
  const Smem& smem;
  int group;           // 0, 1
  uint32_t tiles = 0;  // of all items so far, those with their output

  __device__ Consumer(const AttentionParams& params, const Smem& s)
      : p(params), args(args_of<Args>(params)), smem(s), group(uniform(threadIdx.x / kGroupThreads - 1)) {}

  __device__ __forceinline__ void run() {
    if (group == 1) named_arrive(kTurnBarrier, 2 * kGroupThreads);  // the first turn is group 0's
    Started started;
    for (uint32_t n = 0;; ++n) {
      const Task& task = await_task(n);
      if (task.request < 0) break;
      // Fetching the merge's code must not delay that of the first item.
      if (kLevels && n == 0) let_next_kernel_launch();
      bool rows = task.end > task.begin;
      if (rows && task.wide) {
        attend_wide(n, task, started);
      } else {
        if (rows) attend_narrow(n, task);
        fence_async_proxy();  // Q's place was written, and TMA is next
        barrier_arrive(smem.q_empty(n));
      }
      barrier_arrive(smem.task_empty(n));
    }
    if (group == 0) named_sync(kTurnBarrier, 2 * kGroupThreads);  // takes the arrival that is left
  }

  // Item n and its queries, which have arrived.
  __device__ __forceinline__ const Task& await_task(uint32_t n) const {
    smem.wait_task_full(n);
    smem.wait_q_full(n);
    fence_async_proxy();  // Q came by cp.async
    return smem.task(n);
  }

  // Slot of tile n, which has arrived.
  template <class Ring>
  __device__ __forceinline__ uint32_t wait_for(const Ring& ring, uint32_t n, bool boxes) const {
    ring.wait_full(n);
    if (!boxes) fence_async_proxy();  // it came by cp.async
    return ring.slot(n);
  }

  template <class Ring>
  __device__ __forceinline__ void release(const Ring& ring, uint32_t n) const {
    if (threadIdx.x % 32 == 0) barrier_arrive(ring.empty_of(n));
  }

  // This warpgroup's part of a tile.
  template <bool kWide>
  struct Part {
    static constexpr int kTokens = kWide ? kTileKv : kTileKv / kConsumers;
    int row, token;

    __device__ explicit Part(int group)
        : row(kWide ? group * kGroupRows : 0), token(kWide ? 0 : group * kTokens) {}
    __device__ __forceinline__ int first_row() const {  // of the thread's two
      return row + threadIdx.x % kGroupThreads / 32 * 16 + threadIdx.x % 32 / 4;
    }
    __device__ __forceinline__ uint32_t of_q(uint32_t q) const { return q + row * kLineBytes; }
    __device__ __forceinline__ uint32_t of_kv(uint32_t slot) const { return slot + token * kLineBytes; }
  };

  // The scores of K tile `tiles`, no other product beside them.
  template <bool kWide>
  __device__ __forceinline__ void scores_alone(Scores<Part<kWide>::kTokens>& s, uint32_t q,
                                               const Part<kWide>& part, bool boxes) const {
    uint32_t slot = wait_for(smem.k, tiles, boxes);
    products_fence();
    issue_scores<Part<kWide>::kTokens>(s, part.of_q(q), part.of_kv(slot));
    products_commit();
    products_wait<0>(s);
    release(smem.k, tiles);
  }

  // Issues the output of V tile `tiles`.
  template <bool kWide>
  __device__ __forceinline__ void start_output(Output& o,
                                               const Probabilities<Part<kWide>::kTokens>& probabilities,
                                               const Part<kWide>& part, bool boxes) const {
    uint32_t slot = wait_for(smem.v, tiles, boxes);
    products_fence();
    issue_outputs<Part<kWide>::kTokens>(o, probabilities, part.of_kv(slot));
    products_commit();
  }

  // The weights of a wide item's first tile, if they were computed together with the last output of the item
  // before.
  struct Started {
    bool yes = false;
    Probabilities<kTileKv> probabilities;
    float max[2], sum[2];
  };

  __device__ __forceinline__ void attend_wide(uint32_t n, const Task& task, Started& started) {
    constexpr int kTokens = kTileKv;
    const Part<true> part(group);
    const int first_row = part.first_row();
    const uint32_t q = smem.q(n);
    auto& probabilities = started.probabilities;
    Output o = {};
    Scores<kTokens> s;
    float keep[2];

    start_timer(n);
    RowState state(p, args, task, first_row);
    if (task.tiles > 0) {
      const BoxTiles by_tma = smem.box_tiles(n);
      bool boxes = by_tma.has(0);
      int token = task.first_token + part.token;
      if (started.yes) {
        state.take(started.max, started.sum);
      } else {
        scores_alone(s, q, part, boxes);
        if constexpr (kTileList) state.whole = task.whole(0);
        state.step<kTokens>(s, keep, token, [](float) {});
        RowState::pack<kTokens>(probabilities, s);
      }

      // Scores of the next K tile and output of the last V tile: returns when the scores are there.
      auto advance = [&](uint32_t q, bool k_boxes) {
        uint32_t slot = wait_for(smem.k, tiles + 1, k_boxes);
        named_sync(kTurnBarrier + group, 2 * kGroupThreads);
        products_fence();
        issue_scores<kTokens>(s, part.of_q(q), part.of_kv(slot));
        products_commit();
        start_output(o, probabilities, part, boxes);
        named_arrive(kTurnBarrier + 1 - group, 2 * kGroupThreads);
        products_wait<1>(s);
        release(smem.k, tiles + 1);
        boxes = k_boxes;
      };
      auto output_done = [&](float x) {  // as early as may be: V's slot is wanted
        before_next_wait(x, smem_address(&smem.control.nowhere));
        products_wait<0>(o);
        release(smem.v, tiles);
      };

      for (int tile = 1; tile < task.tiles; ++tile) {
        token = kTileList ? task.token_of_tile(tile) + part.token : token + kTileKv;
        if constexpr (kTileList) state.whole = task.whole(tile);
        advance(q, by_tma.has(tile));
        if (state.step<kTokens>(s, keep, token, output_done)) RowState::rescale(o, keep);
        RowState::pack<kTokens>(probabilities, s);
        ++tiles;
      }
      barrier_arrive(smem.q_empty(n));  // early: if there is but one place, the next item's queries want it
      started.yes = wide_next(n);
      if (started.yes) {
        const Task& next = smem.task(n + 1);
        const Transforms transforms(p, args, next, first_row);
        advance(smem.q(n + 1), smem.box_tiles(n + 1).has(0));
        RowState next_state(p, args, next, first_row, transforms);
        if constexpr (kTileList) next_state.whole = next.whole(0);
        next_state.step<kTokens>(s, keep, next.first_token + part.token, output_done);
        next_state.give(started.max, started.sum);
        RowState::pack<kTokens>(probabilities, s);
      } else {
        start_output(o, probabilities, part, boxes);
        output_done(0.f);
      }
      ++tiles;
    } else {
      barrier_arrive(smem.q_empty(n));
    }

    state.finish();
    if (task.slot >= 0) {
      store_rows(state, o);
    } else {
      store_whole_rows(state, o);
    }
    stop_timer(n);
  }

  // One tile after the other: a narrow item waits for memory, and its code comes from there too.
  __device__ __forceinline__ void attend_narrow(uint32_t n, const Task& task) {
    constexpr int kTokens = Part<false>::kTokens;
    const Part<false> part(group);
    const int first_row = part.first_row();
    const uint32_t q = smem.q(n);
    Output o = {};
    Scores<kTokens> s;
    Probabilities<kTokens> probabilities;
    float keep[2];

    start_timer(n);
    RowState state(p, args, task, first_row);
    const BoxTiles by_tma = smem.box_tiles(n);
    int token = task.first_token + part.token;
    for (int tile = 0; tile < task.tiles; ++tile, token += kTileKv) {
      const bool boxes = by_tma.has(tile);
      if constexpr (kTileList) {
        token = task.token_of_tile(tile) + part.token;
        state.whole = task.whole(tile);
      }
      scores_alone(s, q, part, boxes);
      if (state.step<kTokens>(s, keep, token, [](float) {})) RowState::rescale(o, keep);
      RowState::pack<kTokens>(probabilities, s);
      start_output(o, probabilities, part, boxes);
      products_wait<0>(o);
      release(smem.v, tiles);
      ++tiles;
    }
    state.finish();
    join_groups(state, o, q);
    stop_timer(n);
  }

  __device__ __forceinline__ static bool timed() { return kProfile && threadIdx.x == kGroupThreads; }
  __device__ __forceinline__ void start_timer(uint32_t n) const {
    if (timed()) ItemTimer<kProfile>::start(p, smem.item(n));
  }
  __device__ __forceinline__ void stop_timer(uint32_t n) const {
    if constexpr (kProfile) named_sync(kConsumersBarrier, kConsumers * kGroupThreads);
    if (timed()) ItemTimer<kProfile>::stop(p, smem.item(n));
  }

  __device__ __forceinline__ bool wide_next(uint32_t n) const {
    if constexpr (kQStages == 1) return false;  // the next item's queries want this one's place
    const Task& next = await_task(n + 1);
    return next.request >= 0 && next.end > next.begin && next.tiles > 0 && next.wide;
  }

  __device__ __forceinline__ void join_groups(RowState& state, Output& o, uint32_t q) {
    float* values = reinterpret_cast<float*>(__cvta_shared_to_generic(q));
    bool rows = state.first_row / 16 * 16 < state.task->end - state.task->begin;  // of this warp
    named_sync(kConsumersBarrier, kConsumers * kGroupThreads);                    // both have read Q
    if (group == 1 && rows) give_state(state, o, values, smem.control.states);
    named_sync(kConsumersBarrier, kConsumers * kGroupThreads);
    if (group == 0 && rows) {
      join_state(state, o, values, smem.control.states);
      store_rows(state, o);
    }
  }
};

__global__ void __launch_bounds__(kThreads, 1) attention_kernel(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) unsigned char shared[];
  Smem smem(shared);
  if (threadIdx.x == 0) {
    smem.init_barriers();
    prefetch_map(&params.k);
    prefetch_map(&params.v);
    prefetch_map(&params.q);
  }
  if (threadIdx.x / 32 == 1) QueryProducer(params, smem).prefetch_plan();
  __syncthreads();
  wait_for_kernel_before();                          // which may write the plan, queries, keys: anything
  if constexpr (!kLevels) let_next_kernel_launch();  // the merge, which reads the plan before it waits
  if (threadIdx.x < kGroupThreads) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x < kKvThreads) {
      KvProducer(params, smem).run();
    } else if (threadIdx.x >= kGroupThreads - 32) {
      QueryProducer(params, smem).run();
    }
  } else {
    take_registers<kConsumerRegisters>();
    Consumer(params.attention, smem).run();
  }
}

}  // namespace fi::sm90
