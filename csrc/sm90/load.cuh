// The producer warpgroup, as far ahead of the consumers as there is room: one warp makes work items ready and
// loads their queries, three load KV tiles.
#pragma once
#include "smem.cuh"

namespace fi::sm90 {

// Walks the worker's items, and loads rows of Q by cp.async.
struct QueryProducer {
  const AttentionParams& p;
  const Smem& smem;
  int lane;

  __device__ QueryProducer(const Params& params, const Smem& s)
      : p(params.attention), smem(s), lane(threadIdx.x % 32) {}

  __device__ __forceinline__ void run() const {
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
      if (lane == 0) {
        if (item < end) {
          new (&task) Task(p, args, p.items[item]);
          if (task.end <= task.begin) task.tiles = 0;
        } else {
          task.request = -1;
        }
        barrier_arrive(smem.task_full(stage));
      }
      __syncwarp();
      if (item < end && task.end > task.begin) load_rows(task, smem.q(stage));
      barrier_arrive_copies(smem.q_full(stage));
      if (item >= end) return;
    }
  }

 private:
  // Rows past the end repeat the last one. Of a narrow tile those that exist, to the next 16: nobody looks at
  // the others' results.
  __device__ __forceinline__ void load_rows(const Task& task, uint32_t dst) const {
    constexpr int kChunks = kDimQk / 8;
    const Element* q = static_cast<const Element*>(p.q);
    int rows = task.wide ? kTileQ : (task.end - task.begin + 15) / 16 * 16;
#pragma unroll 4
    for (int index = lane; index < rows * kChunks; index += 32) {
      int row = index / kChunks, chunk = index % kChunks;
      int packed = min(task.begin + row, task.end - 1);
      const Element* src = q + (task.q_first + task.token_of(p, packed)) * p.q_token +
                           task.head_of(p, packed) * p.q_head + chunk * 8;
      copy_async_16(dst + chunk_offset<kTileQ>(row, chunk), src, true);
    }
  }
};

// Page ids of 32 pages in a row, a lane each, and those of the next 32 on their way.
struct PageWindow {
  const Params& params;
  const Task& task;
  int lane, base;
  int entry, next;

  __device__ PageWindow(const Params& all, const Task& t)
      : params(all), task(t), lane(threadIdx.x % 32), base(0), entry(0), next(0) {
    if (params.box_tokens == 0) return;
    base = task.first_token >> params.page_shift;
    entry = read(base);
    next = read(base + 32);
  }

  // All lanes of the warp ask, for pages that never go back.
  __device__ __forceinline__ int page_of(int token) {
    int index = token >> params.page_shift;
    while (__any_sync(~0u, index >= base + 32)) {  // all at once: a tile's pages lie in one window
      base += 32;
      entry = next;
      next = read(base + 32);
    }
    int found = __shfl_sync(~0u, entry, (index - base) & 31);
    return params.attention.batch.entries_are_slots ? found >> params.page_shift : found;
  }

 private:
  __device__ __forceinline__ int read(int first) const {
    int page = first + lane;
    if (page > (task.kv_len - 1) >> params.page_shift) return 0;
    return task.entries[int64_t(page) * params.attention.batch.entry_step];
  }
};

// K0 V0 K1 V1 ... into the ring: boxes by the first warp, tokens gathered by all three. All three wait for
// every slot, in order: a barrier tells two rounds apart, not three.
struct KvProducer {
  const Params& params;
  const AttentionParams& p;
  const Smem& smem;
  int thread;
  uint32_t loads = 0;

  __device__ KvProducer(const Params& all, const Smem& s)
      : params(all), p(all.attention), smem(s), thread(threadIdx.x) {}

  __device__ __forceinline__ void run() {
    for (uint32_t n = 0;; ++n) {
      int stage = n % kQStages;
      barrier_wait(smem.task_full(stage), n / kQStages & 1);
      const Task& task = smem.task(stage);
      if (task.request < 0) return;
      load_tiles(task);
      loads += 2 * task.tiles;
      __syncwarp();
      if (thread % 32 == 0) barrier_arrive(smem.q_empty(stage));
    }
  }

 private:
  __device__ __forceinline__ uint32_t acquire(uint32_t load) const {
    barrier_wait(smem.empty(load), load / kSlots & 1 ^ 1);
    return smem.slot(load);
  }

  __device__ __forceinline__ void load_tiles(const Task& task) const {
    PageWindow window(params, task);
    int first = thread * params.box_tokens;  // of this lane's box, in the tile
    for (int t = 0; t < task.tiles; ++t) {
      uint32_t load = loads + 2 * t;
      int token = task.first_token + t * kTileKv;
      if (!by_boxes(params, task, t)) {
        gather<kLinesQk>(task, load, token, task.k, p.kv.k_page, p.kv.k_token);
        gather<kLinesVo>(task, load + 1, token, task.v, p.kv.v_page, p.kv.v_token);
      } else if (thread < 32) {
        token += first < kTileKv ? first : 0;
        int page = window.page_of(token), offset = token & ((1 << params.page_shift) - 1);
        copy_boxes<kLinesQk>(load, &params.k, first, offset, task.kv_head, page);
        copy_boxes<kLinesVo>(load + 1, &params.v, first, offset, task.kv_head, page);
      } else {
        acquire(load);
        acquire(load + 1);
      }
    }
  }

  template <int kLines>
  __device__ __forceinline__ void copy_boxes(uint32_t load, const CUtensorMap* map, int first, int offset,
                                             int head, int page) const {
    uint32_t slot = acquire(load), full = smem.full(load);
    if (thread == 0) {
      barrier_expect(full, kTileKv * kLines * kLineBytes);
      barrier_arrive(full, kKvThreads);
    }
    __syncwarp();
    if (first >= kTileKv) return;
#pragma unroll
    for (int line = 0; line < kLines; ++line) {
      copy_box(slot + (line * kTileKv + first) * kLineBytes, map, full, line * kLine, offset, head, page);
    }
  }

  // Tokens outside the tile's keys become zero, unread. base already points at the KV head.
  template <int kLines>
  __device__ __forceinline__ void gather(const Task& task, uint32_t load, int token, const Element* base,
                                         int64_t page_stride, int64_t token_stride) const {
    constexpr int kChunks = kLines * 8, kRows = kKvThreads / kChunks, kBatch = 8;
    static_assert(kKvThreads % kChunks == 0, "a thread's copies lie in one column");
    uint32_t slot = acquire(load);
    int chunk = thread % kChunks, first = thread / kChunks;
    for (int row0 = first; row0 < kTileKv; row0 += kRows * kBatch) {
      TokenPlace places[kBatch];  // looked up side by side
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        int row = row0 + i * kRows;
        places[i] = row < kTileKv ? find(task, token + row) : TokenPlace{-1, 0};
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        int row = row0 + i * kRows;
        if (row >= kTileKv) break;
        bool valid = places[i].page >= 0;
        const Element* src =
            base + (valid ? places[i].page * page_stride + places[i].offset * token_stride : 0) + chunk * 8;
        copy_async_16(slot + chunk_offset<kTileKv>(row, chunk), src, valid);
      }
    }
    barrier_arrive_copies(smem.full(load));
  }

  // Task::find, with shifts for divisions where the page size allows.
  __device__ __forceinline__ TokenPlace find(const Task& task, int token) const {
    if (params.page_shift < 0) return task.find(p, token);
    if (token < task.key_begin || token >= task.key_end) return {-1, 0};
    int page = token >> params.page_shift;
    int entry = task.entries[int64_t(page) * p.batch.entry_step];
    return {p.batch.entries_are_slots ? entry >> params.page_shift : entry,
            token - (page << params.page_shift)};
  }
};

}  // namespace fi::sm90
