// The persistent kernel: each CTA is a worker and walks its items; per item load, mma, store.
//
// A wide tile gives every warp its own rows (32 of 128, or 16 of 64 for wide heads) and all tokens of a KV
// tile; a narrow tile gives every warp the same 16 rows and a quarter of the tokens, and the warps' states
// meet in shared memory at the end. Batch invariant builds have wide tiles alone: one arithmetic for all
// rows.
//
// K and V tiles alternate in one ring of slots (K0 V0 K1 V1 ...). Step h waits for its own tile, passes one
// barrier (everybody has left step h - 1), starts the copy of step h + kSlots - 1 into the slot just left,
// then computes.
#pragma once
#include "../smxx/vector.cuh"
#include "chunk.cuh"
#include "load.cuh"
#include "mma.cuh"
#include "softmax.cuh"
#include "store.cuh"

namespace fi::sm80 {

static_assert(sizeof(Task) + sizeof(int32_t) <= 128, "kPlaceBytes");

struct Smem {
  uint32_t q, ring;
  TokenPlace* places;  // [2][kTileKv]
  Task* task;
  int32_t* cursor;  // next item; -1: none left. Here, not in a register that would be kept across an item
  float* exchange;  // Q and ring again, once the item's copies and products are done

  __device__ explicit Smem(unsigned char* base)
      : q(smem_address(base)),
        ring(q + kQBytes),
        places(reinterpret_cast<TokenPlace*>(base + kDataBytes)),
        task(reinterpret_cast<Task*>(places + 2 * kTileKv)),
        cursor(reinterpret_cast<int32_t*>(task + 1)),
        exchange(reinterpret_cast<float*>(base)) {}
};

// Copies of one item, in the order K0 V0 K1 V1 ...; TokenPlaces run one tile ahead of the copies, the page
// table one more ahead in a register.
struct TileStream {
  const AttentionParams& p;
  const Smem& smem;
  int thread;
  TokenPlace next;  // of the tile after the last one that was copied, this thread's token

  __device__ TileStream(int thread_index, const AttentionParams& params, const Smem& s)
      : p(params), smem(s), thread(thread_index) {
    if (thread < kTileKv) smem.places[thread] = look_up(0);
    next = look_up(1);
    __syncthreads();
  }

  __device__ __forceinline__ TokenPlace look_up(int t) const {
    if (thread >= kTileKv || t >= smem.task->tiles) return {-1, 0};
    return smem.task->find(p, smem.task->token_of_tile(t) + thread);
  }

  // Starts the next copy, if the tile exists; always commits, so that groups count steps.
  template <bool kIsK>
  __device__ __forceinline__ void issue(int tile, uint32_t slot) {
    if (tile < smem.task->tiles) {
      const TokenPlace* places = smem.places + (tile & 1) * kTileKv;
      if constexpr (kIsK) {
        // places of tile - 1 are no longer read: its V copy was started before the last barrier
        if (thread < kTileKv) smem.places[((tile + 1) & 1) * kTileKv + thread] = next;
        next = look_up(tile + 2);
        load_tokens<LayoutQk>(thread, slot, places, smem.task->k, p.kv.k_page, p.kv.k_token);
      } else {
        load_tokens<LayoutVo>(thread, slot, places, smem.task->v, p.kv.v_page, p.kv.v_token);
      }
    }
    copy_async_commit();
  }

  __device__ __forceinline__ uint32_t slot_after(uint32_t slot) const {
    return slot == smem.ring + (kSlots - 1) * kSlotBytes ? smem.ring : slot + kSlotBytes;
  }
  __device__ __forceinline__ uint32_t slot_before(uint32_t slot) const {
    return slot == smem.ring ? smem.ring + (kSlots - 1) * kSlotBytes : slot - kSlotBytes;
  }
};

// What lies in shared memory becomes what the variant makes of it; barriers come before and after.
__device__ __forceinline__ void transform_q(const AttentionParams& p, const Args& args, const Smem& smem,
                                            int rows) {
  if constexpr (Variant::kHasQuery) {
    int thread = fresh_thread_index();
    transform_queries(p, args, *smem.task, rows, thread / 32, kWarps, thread % 32,
                      [&](int row, int chunk) { return element_at(smem.q + LayoutQk::offset(row, chunk)); });
  }
}

template <bool kOfV>
__device__ __forceinline__ void transform_kv(const Args& args, const Smem& smem, int tile, uint32_t slot) {
  if constexpr (kOfV ? Variant::kHasValue : Variant::kHasKey) {
    using Layout = std::conditional_t<kOfV, LayoutVo, LayoutQk>;
    int thread = fresh_thread_index();
    transform_tokens<kOfV>(args, *smem.task, smem.task->token_of_tile(tile), thread / 32, kWarps, thread % 32,
                           [=](int row, int chunk) { return element_at(slot + Layout::offset(row, chunk)); });
  }
}

// The task in shared memory; all threads enter and leave at a barrier.
template <bool kWide>
__device__ __forceinline__ void process(const AttentionParams& p, const Args& args, const Smem& smem) {
  constexpr int kFragments = kWide ? kWideFragments : 1;
  constexpr int kTokens = kWide ? kTileKv : kTileKv / kWarps;  // a warp's share of a KV tile
  const Task& task = *smem.task;
  int thread = fresh_thread_index(), lane = thread % 32, warp = thread / 32;
  int warp_row = kWide ? 16 * kFragments * warp : 0;
  int warp_token = kWide ? 0 : kTokens * warp;
  auto has_rows = [&](int fragment = 0) {
    return task.begin + warp_row + 16 * fragment < task.end;
  };  // read anew: a register less across the loop

  RowState<kWide> state(thread, p, args, task);
  Output o[kFragments] = {};
  if (task.tiles > 0) {
    load_queries<kWide ? kTileQ : 16>(thread, smem.q, p, task);
    TileStream stream(thread, p, smem);
    constexpr bool kEven = kSlots % 2 == 0;  // the copy started in a K step is then one of V
    stream.issue<true>(0, smem.ring);
    if constexpr (kSlots > 2) stream.issue<false>(0, smem.ring + kSlotBytes);
    if constexpr (kSlots > 3) {
      __syncthreads();  // the places of tile 1 are in shared memory
      stream.issue<true>(1, smem.ring + 2 * kSlotBytes);
    }
    Queries<kFragments> q(lane, smem.q, warp_row);
    Probabilities<kTokens> probabilities[kFragments];
    uint32_t slot = smem.ring;
    for (int tile = 0; tile < task.tiles; ++tile) {
      copy_async_wait<kSlots - 2>();
      __syncthreads();
      stream.issue<!kEven>(tile + (kSlots - 1) / 2, stream.slot_before(slot));
      if constexpr (Variant::kHasQuery || Variant::kHasKey) {
        if (tile == 0) transform_q(p, args, smem, kWide ? kTileQ : 16);
        transform_kv<false>(args, smem, tile, slot);
        __syncthreads();
      }
      if (tile == 0) q.keep();
      if (has_rows()) {
        int token = task.token_of_tile(tile) + warp_token;
        if constexpr (kTileList) state.whole = task.whole(tile);
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          if (kBatchInvariant && f > 0 && !has_rows(f)) continue;  // decodes are wide tiles too
          Scores<kTokens> s;
          scores<kTokens>(lane, s, q, f, slot, warp_token);
          state.template step<kTokens>(probabilities[f], s, o[f], f, token);
        }
      }
      slot = stream.slot_after(slot);
      copy_async_wait<kSlots - 2>();
      __syncthreads();
      stream.issue<kEven>(tile + kSlots / 2, stream.slot_before(slot));
      if constexpr (Variant::kHasValue) {
        transform_kv<true>(args, smem, tile, slot);
        __syncthreads();
      }
      if (kBatchInvariant && kFragments > 1 && !has_rows(kFragments - 1)) {
        if (has_rows()) accumulate<kTokens, 1>(lane, o, probabilities, slot, warp_token);
      } else if (has_rows()) {
        accumulate<kTokens, kFragments>(lane, o, probabilities, slot, warp_token);
      }
      slot = stream.slot_after(slot);
    }
    copy_async_wait<0>();
    __syncthreads();  // the ring and Q are free again
  }
  state.finish();
  if constexpr (kBatchInvariant) {
    join_chunk(state, o);
  } else if constexpr (kWide) {
    store_wide(state, o);
  } else {
    exchange_warps(smem.exchange, state, o);
    store_narrow(p, args, task, smem.exchange);
  }
}

// Batch invariant: every chunk from the start, so that it has the bits of one that is a work item of its own.
__device__ __forceinline__ void process_in_chunks(const AttentionParams& p, const Args& args,
                                                  const Smem& smem) {
  while (true) {
    process<true>(p, args, smem);
    if (smem.task->last_chunk()) return;
    __syncthreads();  // everybody has left the chunk
    if (fresh_thread_index() == 0) smem.task->next_chunk();
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads, kTiles.ctas_per_sm)
    attention_kernel(const __grid_constant__ AttentionParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  Smem smem(shared);
  const Args& args = args_of<Args>(p);
  if (fresh_thread_index() == 0) *smem.cursor = p.worker_indptr[blockIdx.x];
  while (true) {
    __syncthreads();  // the last item is done with shared memory
    if (fresh_thread_index() == 0) {
      int i = *smem.cursor;
      bool left = i < p.worker_indptr[blockIdx.x + 1];
      *smem.cursor = left ? i + 1 : -1;
      if (i > p.worker_indptr[blockIdx.x]) ItemTimer<kProfile>::stop(p, i - 1);
      if (left) {
        ItemTimer<kProfile>::start(p, i);
        new (smem.task) Task(p, args, p.items[i]);
      }
    }
    __syncthreads();
    if (*smem.cursor < 0) return;
    if (smem.task->end <= smem.task->begin) continue;
    if constexpr (kBatchInvariant) {
      process_in_chunks(p, args, smem);
    } else if (smem.task->wide) {
      process<true>(p, args, smem);
    } else {
      process<false>(p, args, smem);
    }
  }
}

}  // namespace fi::sm80
