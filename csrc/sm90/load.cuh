// The producer warpgroup, as far ahead of the consumers as there is room: one warp makes work items ready and
// loads their queries, three load KV tiles.
#pragma once
#include "../smxx/vector.cuh"
#include "smem.cuh"

namespace fi::sm90 {

// Walks the worker's items, and loads rows of Q: whole wide tiles by TMA where the heads of a group fill
// them, others by cp.async. So are those that it transforms, which this warp then awaits.
struct QueryProducer {
  const Params& params;
  const AttentionParams& p;
  const Smem& smem;
  int lane;

  __device__ QueryProducer(const Params& all, const Smem& s)
      : params(all), p(all.attention), smem(s), lane(threadIdx.x % 32) {}

  // What the first item is read from, one after the other, and the matrix products of a layer drive out of
  // L2. Not read yet: the kernel before may be writing it.
  __device__ __forceinline__ void prefetch_plan() const {
    constexpr int kEntries = 128 / sizeof(int32_t);  // of a line of L2
    if (lane == 0) {
      prefetch(p.header);
      prefetch(p.worker_indptr + blockIdx.x);
      prefetch(p.items + blockIdx.x);  // near the first, where workers have few
    }
    int first = lane * kEntries;
    if (first <= p.batch.num_requests) prefetch(p.batch.qo_indptr + first);
    if (first < p.batch.num_requests) prefetch(p.batch.kv_len + first);
  }

  // A plan without prefixes has code of its own: code comes from memory, line by line.
  __device__ __forceinline__ void run() const {
    if (kLevels && p.header->places > 0) {
      walk<kLevels>();
    } else {
      walk<false>();
    }
  }

 private:
  template <bool kShared>
  __device__ __forceinline__ void walk() const {
    const Args& args = args_of<Args>(p);
    int slices = p.header->rounds * gridDim.x, slice = blockIdx.x;
    int item = p.worker_indptr[slice], end = p.worker_indptr[slice + 1];
    for (uint32_t n = 0;; ++n, ++item) {
      while (item >= end && (slice += gridDim.x) < slices) {
        item = p.worker_indptr[slice];
        end = p.worker_indptr[slice + 1];
      }
      smem.wait_task_empty(n);
      Task& task = smem.task(n);
      if (lane == 0) {
        if (item < end) {
          new (&task) Task(p, args, p.items[item], std::bool_constant<kShared>{});
          if (task.end <= task.begin) task.tiles = 0;
          new (&smem.box_tiles(n)) BoxTiles(params, task);
          if constexpr (kProfile) smem.item(n) = item;
        } else {
          task.request = -1;
        }
        barrier_arrive(smem.task_full(n));
      }
      __syncwarp();
      smem.wait_q_empty(n);
      if (item < end && task.end > task.begin) {
        if (!Variant::kHasQuery && params.q_boxes && task.wide && !(kShared && task.scattered())) {
          if (lane == 0) load_boxes(task, smem.q(n), smem.q_full(n));
        } else if (kShared && !Variant::kHasQuery && params.token_boxes && task.scattered()) {
          load_tokens(task, smem.q(n), smem.q_full(n));
        } else if (kShared && task.scattered()) {
          load_rows(task, smem.q(n), [&](int packed) { return task.query_token(p, packed); });
        } else {
          load_rows(task, smem.q(n), [&](int packed) { return task.q_first + task.token_of(p, packed); });
        }
      }
      if constexpr (Variant::kHasQuery) {
        if (item < end && task.end > task.begin) transform(args, task, smem.q(n));
        barrier_arrive(smem.q_full(n));
      } else {
        barrier_arrive_copies(smem.q_full(n));
      }
      if (item >= end) return;
    }
  }

  // Rows past the end are other requests' or zero.
  __device__ __forceinline__ void load_boxes(const Task& task, uint32_t dst, uint32_t full) const {
    barrier_expect(full, kQBytes);
#pragma unroll
    for (int line = 0; line < kLinesQk; ++line)
      copy_box(dst + line * kTileQ * kLineBytes, &params.q, full, line * kLine, task.kv_head * p.group,
               task.q_first + task.token_of(p, task.begin), 0);
  }

  // A lane has a token, and it is known at once where all lie. Rows past the end repeat the last token.
  __device__ __forceinline__ void load_tokens(const Task& task, uint32_t dst, uint32_t full) const {
    const int first = task.q_first + task.token_of(p, task.begin);
    const int last = task.q_first + task.token_of(p, task.end - 1);
    const int tokens = (rows_of(task) + p.group - 1) / p.group;
    for (int i = lane; i < tokens; i += 32) {
      const int token = task.token_at(min(first + i, last));
      barrier_expect(full, kLinesQk * p.group * kLineBytes);
#pragma unroll
      for (int line = 0; line < kLinesQk; ++line)
        copy_box(dst + (line * kTileQ + i * p.group) * kLineBytes, &params.q_token, full, line * kLine,
                 task.kv_head * p.group, token, 0);
    }
  }

  // Rows past the end repeat the last one. Of a narrow tile those that exist, to the next 16: nobody looks at
  // the others' results.
  template <class TokenOf>
  __device__ __forceinline__ void load_rows(const Task& task, uint32_t dst, TokenOf token_of) const {
    constexpr int kChunks = kDimQk / 8;
    const Element* q = static_cast<const Element*>(p.q);
    int rows = rows_of(task);
#pragma unroll 4
    for (int index = lane; index < rows * kChunks; index += 32) {
      int row = index / kChunks, chunk = index % kChunks;
      int packed = min(task.begin + row, task.end - 1);
      const Element* src = q + token_of(packed) * p.q_token + task.head_of(p, packed) * p.q_head + chunk * 8;
      copy_async_16(dst + chunk_offset<kTileQ>(row, chunk), src, true);
    }
  }

  __device__ __forceinline__ static int rows_of(const Task& task) {
    return task.wide ? kTileQ : (task.end - task.begin + 15) / 16 * 16;
  }

  __device__ __forceinline__ void transform(const Args& args, const Task& task, uint32_t rows) const {
    wait_copies();
    __syncwarp();
    transform_queries(p, args, task, rows_of(task), 0, 1, lane, [=](int row, int chunk) {
      return element_at(rows + chunk_offset<kTileQ>(row, chunk));
    });
    fence_async_proxy();
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

  // Pages before a KV tile that is far off, in plans that skip, are not looked at.
  __device__ __forceinline__ void skip_to(int token) {
    int first = token >> params.page_shift;
    if (first < base + 64) return;
    base = first;
    entry = read(base);
    next = read(base + 32);
  }

  // All lanes of the warp ask, for pages of one tile: fewer than 32, none before those of the last call's.
  __device__ __forceinline__ int page_of(int token) {
    int index = token >> params.page_shift;
    while (__all_sync(~0u, index >= base + 32)) {
      base += 32;
      entry = next;
      next = read(base + 32);
    }
    int near = __shfl_sync(~0u, entry, (index - base) & 31),
        far = __shfl_sync(~0u, next, (index - base) & 31);
    int found = index < base + 32 ? near : far;
    return params.attention.batch.entries_are_slots ? found >> params.page_shift : found;
  }

 private:
  __device__ __forceinline__ int read(int first) const {
    int page = first + lane;
    if (page > (task.kv_len - 1) >> params.page_shift) return 0;
    return task.entries[int64_t(page) * params.attention.batch.entry_step];
  }
};

enum class Way : int32_t {
  kBoxes,  // of pages, dealt out to the lanes
  kRun,    // boxes of the warp's tokens, which all lie one behind the other
  kWhole,  // gathered, and every token of the tile is a key of it
  kPart,   // gathered
};

// Where a KV tile comes from, as one lane sees it: its box of K and of V, or two of its warp's tokens, with
// entries of the page table for pages: they arrive while other tiles are loaded.
struct Source {
  Way way;
  TokenPlace at[2];
};

// K0 K1 V0 K2 V1 ... as the consumers want them. Where the variant transforms keys or values, this is done a
// tile behind the loads: with two slots, the one that is awaited then holds a tile that consumers can leave.
struct KvProducer {
  static constexpr int kWarps = kKvThreads / 32;
  // A warp gathers kRows tokens at a time by kLanes lanes each, a lane 16 bytes. Their places in eight lines
  // repeat after few passes, so that addresses are constants.
  static constexpr int kRows = kDimQk <= 64 ? 4 : kDimQk <= 128 ? 2 : 1, kLanes = 32 / kRows;
  static_assert(kLinesQk * (kTileKv / 8) <= kKvThreads, "a box a lane");

  const Params& params;
  const AttentionParams& p;
  const Smem& smem;
  int lane, warp, first, tokens;  // of a tile, the warp's
  uint32_t k_tiles = 0, v_tiles = 0;

  __device__ KvProducer(const Params& all, const Smem& s)
      : params(all),
        p(all.attention),
        smem(s),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        first(warp * kWarpTokens),
        tokens(max(0, min(kWarpTokens, kTileKv - first))) {}

  __device__ __forceinline__ void run() {
    for (uint32_t n = 0;; ++n) {
      smem.wait_task_full(n);
      const Task task = smem.task(n);  // in registers, what is used of it
      if (task.request < 0) return;
      if (task.tiles > 0) load_tiles(task, smem.box_tiles(n));
      barrier_arrive(smem.task_empty(n));
    }
  }

 private:
  __device__ __forceinline__ void load_tiles(const Task& task, const BoxTiles by_tma) {
    constexpr int kPatience = 8;  // tiles gathered before tokens are looked at again
    int look = 0;
    PageWindow window(params, task);
    Source next = find_tile(task, window, 0, by_tma.has(0)), source, before;
#pragma unroll 1
    for (int t = 0; t <= task.tiles; ++t) {
      before = source;
      source = next;
      if (t < task.tiles) {
        if (t >= look) {
          if (is_run(source)) {
            source.way = Way::kRun;
          } else {
            look = t + kPatience;
          }
        }
        if (t + 1 < task.tiles) next = find_tile(task, window, t + 1, by_tma.has(t + 1));
        load<false>(task, source);
      }
      if (t > 0) load<true>(task, before);
      if (t > 0) transform<false>(task, t - 1, k_tiles - (t < task.tiles ? 2 : 1));
      if (t > 1) transform<true>(task, t - 2, v_tiles - 2);
    }
    transform<true>(task, task.tiles - 1, v_tiles - 1);
  }

  // Tile t of the task, number n of all.
  template <bool kOfV>
  __device__ __forceinline__ void transform(const Task& task, int t, uint32_t n) const {
    if constexpr (kOfV ? Variant::kHasValue : Variant::kHasKey) {
      const Args& args = args_of<Args>(p);
      const auto& ring = smem.ring<kOfV>();
      ring.wait_landed(n);
      transform_tokens<kOfV>(args, task, task.token_of_tile(t), warp, kWarps, lane,
                             [slot = ring.slot(n)](int row, int chunk) {
                               return element_at(slot + chunk_offset<kTileKv>(row, chunk));
                             });
      fence_async_proxy();
      barrier_arrive(ring.full_of(n));
    }
  }

  // The next tile of K or, if kOfV, of V. Code of their own: tensor maps are named by constants.
  template <bool kOfV>
  __device__ __forceinline__ void load(const Task& task, const Source& source) {
    constexpr int kDim = kOfV ? kDimVo : kDimQk, kLines = (kDim + kLine - 1) / kLine;
    const auto& ring = smem.ring<kOfV>();
    uint32_t tile = kOfV ? v_tiles++ : k_tiles++;
    ring.wait_empty(tile);
    uint32_t slot = ring.slot(tile), full = ring.landed_of(tile);
    const CUtensorMap* map = kOfV ? &params.v : &params.k;
    if (source.way == Way::kBoxes) {
      copy_boxes<kLines>(slot, full, map, task.kv_head, source.at[kOfV]);
    } else if (source.way == Way::kRun) {
      copy_run<kLines>(slot, full, map, task.kv_head, source.at[0]);
    } else if (kOfV) {
      gather<kDim>(slot, full, source, task.v, params.v_steps);
    } else {
      gather<kDim>(slot, full, source, task.k, params.k_steps);
    }
  }

  __device__ __forceinline__ Source find_tile(const Task& task, PageWindow& window, int t, bool boxes) const {
    int token = task.token_of_tile(t);
    if (boxes) {
      if constexpr (kTileList) window.skip_to(token);
      TokenPlace k = find_box<kLinesQk>(window, token);
      if constexpr (kLinesQk == kLinesVo) return {Way::kBoxes, {k, k}};
      return {Way::kBoxes, {k, find_box<kLinesVo>(window, token)}};
    }
    bool whole = token >= task.key_begin && token + kTileKv <= task.key_end;
    return {whole ? Way::kWhole : Way::kPart,
            {find_token(task, token, held()), find_token(task, token, held() + 32)}};
  }

  // Boxes are dealt out to the warps: a warp issues one at a time.
  __device__ __forceinline__ int box() const { return lane * kWarps + warp; }

  template <int kLines>
  __device__ __forceinline__ TokenPlace find_box(PageWindow& window, int token) const {
    int row = box() / kLines * params.box_tokens;
    token += row < kTileKv ? row : 0;
    return {window.page_of(token), token & ((1 << params.page_shift) - 1)};
  }

  template <int kLines>
  __device__ __forceinline__ void copy_boxes(uint32_t slot, uint32_t full, const CUtensorMap* map, int head,
                                             TokenPlace at) const {
    if (threadIdx.x == 0) {
      barrier_expect(full, kTileKv * kLines * kLineBytes);
      barrier_arrive(full, kKvThreads);
    }
    __syncwarp();
    int row = box() / kLines * params.box_tokens, line = box() % kLines;
    if (row >= kTileKv) return;
    copy_box(slot + (line * kTileKv + row) * kLineBytes, map, full, line * kLine, at.offset, head, at.page);
  }

  // The first of the warp's tokens that the lane knows: those of a pass at the same place in their lanes.
  __device__ __forceinline__ int held() const { return lane % kLanes * kRows + lane / kLanes; }

  // n: of the warp's tokens, in their order. An entry of the page table in place of the page.
  __device__ __forceinline__ TokenPlace find_token(const Task& task, int tile_token, int n) const {
    int token = tile_token + first + n;
    if (n >= tokens || token < task.key_begin || token >= task.key_end) return {-1, 0};
    int page = params.page_shift < 0 ? token / p.kv.page_size : token >> params.page_shift;
    return {task.entries[int64_t(page) * p.batch.entry_step], token - page * p.kv.page_size};
  }

  __device__ __forceinline__ int page_of(TokenPlace at) const {
    if (!p.batch.entries_are_slots) return at.page;
    return params.page_shift < 0 ? at.page / p.kv.page_size : at.page >> params.page_shift;
  }

  static constexpr uint32_t kNoKey = ~0u;

  // From the base, in 16 bytes, of which a cache has fewer than 2^32: check_cache in csrc/core.
  __device__ __forceinline__ uint32_t offset_of(TokenPlace at, const Steps& steps) const {
    return at.page < 0 ? kNoKey : page_of(at) * steps.page + at.offset * steps.token;
  }

  // Number of the token in a cache whose pages lie one behind the other.
  __device__ __forceinline__ int slot_of(TokenPlace at) const {
    return page_of(at) * p.kv.page_size + at.offset;
  }

  __device__ __forceinline__ bool is_run(const Source& source) const {
    if (!params.runs || source.way != Way::kWhole) return false;
    int before = slot_of(source.at[0]) - held();  // the first token's slot, if it is one
    int begin = __shfl_sync(~0u, before, 0);      // not behind &&: some lanes would wait for ever
    return __all_sync(~0u, (held() >= tokens || before == begin) &&
                               (held() + 32 >= tokens || slot_of(source.at[1]) - held() == begin + 32));
  }

  // at: lane 0's is the first token.
  template <int kLines>
  __device__ __forceinline__ void copy_run(uint32_t slot, uint32_t full, const CUtensorMap* map, int head,
                                           TokenPlace at) const {
    int begin = __shfl_sync(~0u, slot_of(at), 0);
    if (lane == 0) {
      barrier_expect(full, tokens * kLines * kLineBytes);
      barrier_arrive(full, 32);
    }
    __syncwarp();
    int row = lane / kLines * kRunTokens, line = lane % kLines;
    if (row >= tokens) return;
    copy_box(slot + (line * kTileKv + first + row) * kLineBytes, map, full, line * kLine, begin + row, head,
             0);
  }

  // Tokens that are not keys of the tile become zero, unread. base already points at the KV head.
  template <int kDim>
  __device__ __forceinline__ void gather(uint32_t slot, uint32_t full, const Source& source,
                                         const Element* base, const Steps& steps) const {
    static_assert(kDim / 8 <= kLanes && kWarpTokens <= 64, "two tokens a lane");
    auto from = reinterpret_cast<uintptr_t>(base) + lane % kLanes * 16;
    const uint32_t offsets[2] = {offset_of(source.at[0], steps), offset_of(source.at[1], steps)};
    if (source.way == Way::kWhole) {
      gather_rows<kDim, true>(slot, from, offsets);
    } else {
      gather_rows<kDim, false>(slot, from, offsets);
    }
    barrier_arrive_copies(full);
  }

  template <int kDim, bool kWhole>
  __device__ __forceinline__ void gather_rows(uint32_t slot, uintptr_t from,
                                              const uint32_t (&of_tokens)[2]) const {
    // passes looked up together, to wait for shuffles once
    constexpr int kBatch = kRunTokens / kRows < 8 ? kRunTokens / kRows : 8;
    // A line's place in eight repeats after 8 / kRows passes; between the halves of these one bit differs.
    constexpr int kKept = 4 / kRows;
    static_assert(kBatch % (8 / kRows) == 0 && kRunTokens % (kBatch * kRows) == 0);
    bool idle = lane % kLanes >= kDim / 8;
    uint32_t dst[kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i)
      dst[i] = slot + chunk_offset<kTileKv>(first + lane / kLanes + i * kRows, lane % kLanes);
    uint32_t next = of_tokens[0];  // of the passes to come, one lane behind the other
#pragma unroll 1
    for (int row = 0; row < tokens; row += kBatch * kRows) {
      if (row == 32) next = of_tokens[1];
      uint32_t offsets[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) offsets[i] = __shfl_sync(~0u, next, i, kLanes);
      next = __shfl_down_sync(~0u, next, kBatch, kLanes);
      if (idle) continue;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        bool key = kWhole || offsets[i] != kNoKey;
        uint32_t to = dst[i % kKept] ^ i / kKept % 2 * (kLineBytes / 2);
        auto at = reinterpret_cast<const void*>(from + (key ? offsets[i] : 0) * uint64_t(16));
        copy_async_16(to + i / kKept * (kKept * kRows * kLineBytes), at, key);
      }
#pragma unroll
      for (int i = 0; i < kKept; ++i) dst[i] += kBatch * kRows * kLineBytes;
    }
  }
};

}  // namespace fi::sm90
