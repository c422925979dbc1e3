// The persistent kernel: each CTA is a worker and walks its items. One warpgroup loads, two compute.
//
// A wide tile gives each consumer warpgroup 64 of 128 rows and all KV tiles; they take turns in issuing
// products, so that the softmax of one runs beside the products of the other. A narrow tile, at most 64 rows,
// gives both the same rows and half the tokens of each KV tile; their states meet in shared memory at the
// end. So every KV tile is awaited by both, in order: a barrier tells two rounds apart, not three.
//
// Within a warpgroup the scores of a tile are computed together with the output of the tile before.
#pragma once
#include "load.cuh"
#include "mma.cuh"
#include "store.cuh"

namespace fi::sm90 {

struct Consumer {
  const Params& params;
  const AttentionParams& p;
  const Args& args;
  const Smem& smem;
  int group;                  // 0, 1
  uint32_t tiles_before = 0;  // of all items before

  __device__ Consumer(const Params& all, const Smem& s)
      : params(all),
        p(all.attention),
        args(*reinterpret_cast<const Args*>(all.attention.variant_args)),
        smem(s),
        group(threadIdx.x / kGroupThreads - 1) {}

  __device__ __forceinline__ void run() {
    if (group == 1) named_arrive(kTurnBarrier, 2 * kGroupThreads);  // the first turn is group 0's
    for (uint32_t n = 0;; ++n) {
      int stage = n % kQStages;
      barrier_wait(smem.q_full(stage), n / kQStages & 1);
      const Task& task = smem.task(stage);
      if (task.request < 0) break;
      bool timed = kProfile && threadIdx.x == kGroupThreads;
      if (timed) ItemTimer<kProfile>::start(p, smem.control.item[stage]);
      if (task.end > task.begin) {
        fence_async_proxy();  // Q came by cp.async
        if (task.wide) {
          attend<true>(task, smem.q(stage));
        } else {
          attend<false>(task, smem.q(stage));
        }
        tiles_before += task.tiles;
      }
      if constexpr (kProfile) named_sync(kConsumersBarrier, kConsumers * kGroupThreads);
      if (timed) ItemTimer<kProfile>::stop(p, smem.control.item[stage]);
      __syncwarp();
      if (threadIdx.x % 32 == 0) barrier_arrive(smem.q_empty(stage));
    }
    if (group == 0) named_sync(kTurnBarrier, 2 * kGroupThreads);  // takes the arrival that is left
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

  template <bool kWide>
  __device__ __forceinline__ void attend(const Task& task, uint32_t q) {
    constexpr int kTokens = kWide ? kTileKv : kTileKv / kConsumers;  // of a KV tile, for this warpgroup
    int thread = threadIdx.x % kGroupThreads;
    int group_row = kWide ? group * kGroupRows : 0, group_token = kWide ? 0 : group * kTokens;
    uint32_t half = group_token * kLineBytes;
    RowState state(p, args, task, group_row + thread / 32 * 16 + thread % 32 / 4);
    Output o;
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) o[i] = 0.f;
    if (int tiles = task.tiles; tiles > 0) {
      uint32_t rows = q + group_row * kLineBytes;
      int token = task.first_token + group_token;
      Scores<kTokens> s;
      Probabilities<kTokens> probabilities;
      float keep[2];
      bool boxes = by_boxes(params, task, 0);
      uint32_t n = tiles_before, slot = wait_for(smem.k, n, boxes);
      products_fence();
      issue_scores<kTokens>(s, rows, slot + half);
      products_commit();
      products_wait<0>(s);
      release(smem.k, n);
      state.step<kTokens, 0>(s, keep[0], token);
      state.step<kTokens, 1>(s, keep[1], token);
      RowState::pack<kTokens>(probabilities, s);
      for (int tile = 1; tile < tiles; ++tile) {
        bool v_boxes = boxes;
        boxes = by_boxes(params, task, tile);
        token += kTileKv;
        slot = wait_for(smem.k, n + 1, boxes);
        if constexpr (kWide) named_sync(kTurnBarrier + group, 2 * kGroupThreads);
        products_fence();
        issue_scores<kTokens>(s, rows, slot + half);
        products_commit();
        slot = wait_for(smem.v, n, v_boxes);
        products_fence();
        issue_outputs<kTokens>(o, probabilities, slot + half);
        products_commit();
        if constexpr (kWide) named_arrive(kTurnBarrier + 1 - group, 2 * kGroupThreads);
        products_wait<1>(s);
        release(smem.k, n + 1);
        state.step<kTokens, 0>(s, keep[0], token);
        products_wait<0>(o);  // not after the second row: V's slot is wanted
        release(smem.v, n);
        state.step<kTokens, 1>(s, keep[1], token);
        RowState::rescale(o, keep);
        RowState::pack<kTokens>(probabilities, s);
        ++n;
      }
      slot = wait_for(smem.v, n, boxes);
      products_fence();
      issue_outputs<kTokens>(o, probabilities, slot + half);
      products_commit();
      products_wait<0>(o);
      release(smem.v, n);
    }
    state.finish();
    if constexpr (kWide) {
      if (task.slot >= 0) {
        store_rows(state, o);
      } else {
        named_sync(kGroupBarrier + group, kGroupThreads);  // all its warps have read Q
        store_whole_rows(state, o, q);
      }
    } else {
      join_groups(task, state, o, q);
    }
  }

  __device__ __forceinline__ void join_groups(const Task& task, RowState& state, Output& o, uint32_t q) {
    float* values = reinterpret_cast<float*>(__cvta_shared_to_generic(q));
    bool rows = state.first_row / 16 * 16 < task.end - task.begin;  // of this warp
    named_sync(kConsumersBarrier, kConsumers * kGroupThreads);      // both have read Q
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
  }
  let_next_kernel_launch();
  __syncthreads();
  if (threadIdx.x < kGroupThreads) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x < kKvThreads) {
      KvProducer(params, smem).run();
    } else if (threadIdx.x >= kGroupThreads - 32) {
      QueryProducer(params, smem).run();
    }
  } else {
    take_registers<kConsumerRegisters>();
    Consumer(params, smem).run();
  }
}

}  // namespace fi::sm90
