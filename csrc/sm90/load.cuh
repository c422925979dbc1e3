// The producer warpgroup: work items, queries and KV tiles into shared memory, as far ahead as there is room.
#pragma once
#include "smem.cuh"

namespace fi::sm90 {

struct Producer {
  const Params& params;
  const AttentionParams& p;
  const Smem& smem;
  int thread;
  uint32_t loads = 0;    // K and V tiles so far; their place in the ring
  uint32_t gathers = 0;  // KV tiles so far that came by cp.async

  __device__ Producer(const Params& all, const Smem& s)
      : params(all), p(all.attention), smem(s), thread(threadIdx.x) {}

  __device__ __forceinline__ void run() {
    const Args& args = *reinterpret_cast<const Args*>(p.variant_args);
    int slices = p.header->rounds * gridDim.x, slice = blockIdx.x;
    int item = p.worker_indptr[slice], end = p.worker_indptr[slice + 1];
    for (uint32_t n = 0;; ++n, ++item) {
      while (item >= end && (slice += gridDim.x) < slices) {
        item = p.worker_indptr[slice];
        end = p.worker_indptr[slice + 1];
      }
      int stage = n % kQStages;
      barrier_wait(smem.q_empty(stage), (n / kQStages & 1) ^ 1);
      Task& task = smem.task(stage);
      if (thread == 0) {
        if (item < end) {
          new (&task) Task(p, args, p.items[item]);
        } else {
          task.request = -1;
        }
      }
      named_sync(kProducerBarrier, kGroupThreads);
      bool rows = item < end && task.end > task.begin;
      if (rows) load_queries(task, smem.q(stage));
      barrier_arrive_copies(smem.q_full(stage));
      if (item >= end) return;
      if (rows) load_tiles(task);
    }
  }

  // The tile's query rows; rows past the end repeat the last one. Of a narrow tile those that exist, to the
  // next 16: nobody looks at the others' results.
  __device__ __forceinline__ void load_queries(const Task& task, uint32_t dst) const {
    constexpr int kChunks = kDimQk / 8;
    const Element* q = static_cast<const Element*>(p.q);
    int rows = task.wide ? kTileQ : (task.end - task.begin + 15) / 16 * 16;
    for (int index = thread; index < rows * kChunks; index += kGroupThreads) {
      int row = index / kChunks, chunk = index % kChunks;
      int packed = min(task.begin + row, task.end - 1);
      const Element* src = q + (task.q_first + task.token_of(p, packed)) * p.q_token +
                           task.head_of(p, packed) * p.q_head + chunk * 8;
      copy_async_16(dst + chunk_offset<kTileQ>(row, chunk), src, true);
    }
  }

  // K0 V0 K1 V1 ...; page table entries are read one tile ahead.
  __device__ __forceinline__ void load_tiles(const Task& task) {
    TokenPlace next = look_up(task, 0);
    int tiles = task.tiles;  // read once: after the last tile the task may be another
    for (int t = 0; t < tiles; ++t) {
      TokenPlace place = next;
      next = look_up(task, t + 1);
      if (by_boxes(params, task, t)) {
        load_boxes<kLinesQk>(task, place, &params.k);
        load_boxes<kLinesVo>(task, place, &params.v);
      } else {
        TokenPlace* places = smem.places() + (gathers++ & 1) * kTileKv;  // the other half may still be read
        if (thread < kTileKv) places[thread] = place;
        named_sync(kProducerBarrier, kGroupThreads);
        load_tokens<kLinesQk>(places, task.k, p.kv.k_page, p.kv.k_token);
        load_tokens<kLinesVo>(places, task.v, p.kv.v_page, p.kv.v_token);
      }
    }
  }

  // Boxes: of the lane's box. Otherwise: of the thread's token.
  __device__ __forceinline__ TokenPlace look_up(const Task& task, int t) const {
    bool boxes = by_boxes(params, task, t);
    int offset = boxes ? thread % 32 * params.box_tokens : thread;
    if (t >= task.tiles || offset >= kTileKv) return {-1, 0};
    return task.find(p, task.first_token + t * kTileKv + offset);
  }

  __device__ __forceinline__ uint32_t acquire() const {
    barrier_wait(smem.empty(loads), loads / kSlots & 1 ^ 1);
    return smem.slot(loads);
  }

  template <int kLines>
  __device__ __forceinline__ void load_boxes(const Task& task, TokenPlace place, const CUtensorMap* map) {
    uint32_t slot = acquire(), full = smem.full(loads++);
    if (thread == 0) {
      barrier_expect(full, kTileKv * kLines * kLineBytes);
    } else {
      barrier_arrive(full);
    }
    if (thread >= 32) return;
    __syncwarp();
    int first = thread * params.box_tokens;
    if (first >= kTileKv) return;
#pragma unroll
    for (int line = 0; line < kLines; ++line) {
      copy_box(slot + (line * kTileKv + first) * kLineBytes, map, full, line * kLine, place.offset,
               task.kv_head, place.page);
    }
  }

  // base already points at the KV head; tokens outside the tile's keys become zero, unread
  template <int kLines>
  __device__ __forceinline__ void load_tokens(const TokenPlace* places, const Element* base,
                                              int64_t page_stride, int64_t token_stride) {
    constexpr int kChunks = kLines * 8;
    uint32_t slot = acquire(), full = smem.full(loads++);
#pragma unroll 4
    for (int index = thread; index < kTileKv * kChunks; index += kGroupThreads) {
      int row = index / kChunks, chunk = index % kChunks;
      TokenPlace at = places[row];
      bool valid = at.page >= 0;
      const Element* src = valid ? base + at.page * page_stride + at.offset * token_stride + chunk * 8 : base;
      copy_async_16(slot + chunk_offset<kTileKv>(row, chunk), src, valid);
    }
    barrier_arrive_copies(full);
  }
};

}  // namespace fi::sm90
