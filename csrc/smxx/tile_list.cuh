// Body of the device's tile lister, apart from its launch so that a test can run it with host threads.
#pragma once
#include "../tile_list.h"

namespace fi::smxx {

template <int kThreads>
struct ListShared {
  Seen seen[kThreads];  // of the KV tiles of this turn
  int32_t sums[kThreads / 32];
};

// One row tile, that of `line`, if it exists: a warp for each KV tile, a lane for every 32nd of its keys.
// What the device's lengths lead beyond is not listed: the planner finds that out too.
template <class Variant, int kThreads, class A>
__device__ __forceinline__ void list_row_tile(const PlanParams& p, const A& args, int32_t line,
                                              ListShared<kThreads>& shared) {
  constexpr int kWarps = kThreads / 32;
  int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  int32_t request = 0;
  for (int32_t high = p.num_requests; high - request > 1;) {
    int32_t middle = request + (high - request) / 2;
    if (line_of(p, middle, 0) <= line) {
      request = middle;
    } else {
      high = middle;
    }
  }
  if (p.num_requests == 0) return;
  const Rows r = rows_of(p, request);
  const int32_t index = line - int32_t(line_of(p, request, 0));
  if (index >= row_tiles(p, r) || !fits_list(p, request, r)) return;

  const TileTokens tokens = tokens_of(p, request, r, index);
  const KeyRange range = tiles_in_range<Variant>(args, tokens, p.tile_kv);
  int32_t* tiles = p.list.tiles + int64_t(line) * p.list.width;
  int32_t count = 0;
  for (int32_t base = range.begin; base < range.end; base += kThreads) {
    const int32_t base_end = at_most(base + kThreads, range.end);
    for (int32_t tile = base + warp; tile < base_end; tile += kWarps) {
      const int32_t begin = tile * p.tile_kv, end = at_most(begin + p.tile_kv, tokens.kv_len);
      Seen seen{false, end - begin == p.tile_kv};
      for (int32_t token = tokens.begin; token < tokens.end && !(seen.some && !seen.all); ++token) {
        Seen of_lane = seen_by<Variant>(args, tokens.row(token), begin, end, lane, 32);
        bool some = __any_sync(~0u, of_lane.some), all = __all_sync(~0u, of_lane.all);
        seen = {seen.some || some, seen.all && all};
      }
      if (lane == 0) shared.seen[tile - base] = seen;
    }
    __syncthreads();
    const Seen seen = base + tid < base_end ? shared.seen[tid] : Seen{false, false};
    const unsigned votes = __ballot_sync(~0u, seen.some);
    if (lane == 0) shared.sums[warp] = __popc(votes);
    __syncthreads();
    int32_t at = count + __popc(votes & ((1u << lane) - 1));
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) at += shared.sums[w];
      count += shared.sums[w];
    }
    if (seen.some) tiles[at] = ListedTile::of(base + tid, seen.all).entry;
  }
  if (tid == 0) p.list.counts[line] = count;
}

}  // namespace fi::smxx
