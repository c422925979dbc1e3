// Body of the device planner, apart from its launch so that a test can run it with host threads.
#pragma once
#include "../schedule.h"

namespace fi::smxx {

constexpr int kSharedSegments = 1536;  // longer cost lines are searched in global memory

struct Scan {
  int64_t before, sum;  // of the threads before, and of all
};

// Prefix sum over the block. Ends at a barrier, so sums may be used again at once. A call: from the second on
// its instructions are there.
template <int kThreads>
__device__ __noinline__ Scan scan(int64_t x, int64_t* sums) {
  constexpr int kWarps = kThreads / 32;
  static_assert(kWarps >= 1 && kWarps <= 32, "the sums of all warps are added by one warp");
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  long long inclusive = x;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    long long below = __shfl_up_sync(0xffffffffu, inclusive, d);
    if (lane >= d) inclusive += below;
  }
  if (lane == 31) sums[warp] = inclusive;
  __syncthreads();
  long long warps = lane < kWarps ? sums[lane] : 0;  // every warp adds them for itself: one barrier less
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    long long below = __shfl_up_sync(0xffffffffu, warps, d);
    if (lane >= d) warps += below;
  }
  long long sum = __shfl_sync(0xffffffffu, warps, 31);
  long long before = __shfl_sync(0xffffffffu, warps, warp == 0 ? 0 : warp - 1);
  __syncthreads();
  return {(warp == 0 ? 0 : before) + inclusive - x, sum};
}

// Two counts below 2^31 in one scan.
__device__ __forceinline__ int64_t pack(const Count& n) { return int64_t(n.inside) << 32 | n.openers; }
__device__ __forceinline__ Count unpack(int64_t x) { return {int32_t(x >> 32), int32_t(x & 0x7fffffff)}; }

__device__ __forceinline__ void store(WorkItem* to, const WorkItem& item) {
  int4* words = reinterpret_cast<int4*>(to);
  words[0] = make_int4(item.request, item.row_begin, item.kv_head, item.kv_begin);
  words[1] = make_int4(item.kv_end, item.slot, item.flags, item.level);
}

// One atomic a warp: lanes would take turns.
__device__ __forceinline__ void raise(int32_t* to, int32_t x) {
  x = __reduce_max_sync(0xffffffffu, x);
  if (threadIdx.x % 32 == 0 && x > 0) atomicMax(to, x);
}

template <int kThreads>
struct PlanShared {
  int64_t sums[32];
  int64_t start[kSharedSegments + 1];
  int32_t node[kSharedSegments];
  int32_t tile[kSharedSegments];
  int32_t first[kThreads];  // first segment of each node of this round
  Cut cut[kMaxWorkers + 1];
  Count count[kMaxWorkers + 1];
  int32_t indptr[kMaxWorkers + 1];
  int32_t first_slot[kMaxWorkers];  // of each merge
  int32_t spread[kMaxWorkers + 1];
  int32_t fits[kSpreadTries];
  int64_t round_begin[kMaxRounds + 1];
  int32_t most_tiles[2];
  int32_t wide;
  int32_t longest;
};

// Segments of one KV head, kThreads nodes a round and kThreads segments at a time.
template <int kThreads>
__device__ __forceinline__ Line build_line(const PlanParams& p, PlanShared<kThreads>& shared,
                                           bool* overflow) {
  int tid = threadIdx.x;
  int64_t segments = 0, cost = 0, chunked = 0, state_rows = 0;
  const int32_t all = node_count(p);
  int32_t most_narrow = 0, most_wide = 0, wide = 0;
  // the scans below are barriers
  if (tid == 0) shared.most_tiles[0] = shared.most_tiles[1] = shared.wide = 0;
  for (int32_t node0 = 0; node0 < all; node0 += kThreads) {
    int32_t nodes = at_most(all - node0, kThreads);
    auto [first, round] = scan<kThreads>(tid < nodes ? segment_count(p, node0 + tid) : 0, shared.sums);
    shared.first[tid] = int32_t(at_most(first, INT32_MAX));
    if (has_levels(p) && tid < nodes)
      p.node_segment[node0 + tid] = int32_t(at_most(segments + first, INT32_MAX));
    __syncthreads();
    // lengths are not to be trusted
    int32_t room = int32_t(at_most(round, p.max_segments - segments));
    for (int32_t i0 = 0; i0 < room; i0 += kThreads) {
      int32_t i = i0 + tid, s = int32_t(segments) + i;
      int32_t node = 0, index = 0;
      Segment segment{};
      int64_t own = 0, own_chunked = 0;
      if (i < room) {
        int32_t nth = last_not_above(shared.first, nodes, i);
        node = node0 + nth;
        index = i - shared.first[nth];
        segment = segment_at(p, node, index);
        own = segment_cost(p, segment);
        most_narrow = at_least(most_narrow, segment.wide ? 0 : segment.tiles);
        most_wide = at_least(most_wide, segment.wide ? segment.tiles : 0);
        wide += segment.wide;
        own_chunked = pack(chunk_count(segment));
      }
      Scan costs = scan<kThreads>(own, shared.sums);
      int64_t start = cost + costs.before;
      cost += costs.sum;
      if (i < room) {
        p.segment_start[s] = start;
        p.segment_node[s] = node;
        p.segment_tile[s] = index;
        if (s < kSharedSegments) {
          shared.start[s] = start;
          shared.node[s] = node;
          shared.tile[s] = index;
        }
      }
      if (has_levels(p)) {
        Scan rows = scan<kThreads>(segment.rows, shared.sums);
        if (i < room) p.levels.segment_rows[s] = segment.rows > 0 ? int32_t(state_rows + rows.before) : -1;
        state_rows += rows.sum;
      }
      if (p.chunk_tiles > 0) {
        Scan chunks = scan<kThreads>(own_chunked, shared.sums);
        Count before = unpack(chunked + chunks.before);
        chunked += chunks.sum;
        if (i < room) {
          Count own_count = unpack(own_chunked);
          p.chunk_slot[s] = own_count.inside ? before.inside : -1;
          p.chunk_merge[s] = own_count.openers ? before.openers : -1;
        }
      }
    }
    segments += round;
    if (segments > p.max_segments) break;
  }
  *overflow = segments > p.max_segments;
  if (*overflow) {
    segments = cost = chunked = state_rows = 0;
  } else {
    raise(&shared.most_tiles[0], most_narrow);
    raise(&shared.most_tiles[1], most_wide);
    if (wide > 0) atomicAdd(&shared.wide, wide);
  }
  bool fits = segments <= kSharedSegments;
  if (tid == 0) {
    p.segment_start[segments] = cost;
    if (fits) shared.start[segments] = cost;
  }
  __syncthreads();
  Line line{};
  line.start = fits ? shared.start : p.segment_start;
  line.node = fits ? shared.node : p.segment_node;
  line.tile = fits ? shared.tile : p.segment_tile;
  line.segments = int32_t(segments);
  line.state_rows = int32_t(state_rows);
  line.chunked_segments = unpack(chunked).inside;
  line.chunked_tiles = unpack(chunked).openers;
  line.most_tiles[0] = shared.most_tiles[0];
  line.most_tiles[1] = shared.most_tiles[1];
  line.wide = shared.wide;
  measure(&line, p);
  return line;
}

// Workers of its own for each segment where that is better than cutting by cost: a warp for each candidate.
template <int kThreads>
__device__ __forceinline__ const int32_t* spread(const PlanParams& p, const Line& line,
                                                 PlanShared<kThreads>& shared) {
  static_assert(kThreads == 32 * kSpreadTries, "a warp for every candidate");
  int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  int64_t limit = spread_limit(p, line);
  if (limit < 0) return nullptr;
  int64_t least = spread_least(p, line);
  long long workers = 0;
#pragma unroll 1  // most often one turn, of many instructions
  for (int32_t s = lane; s < line.segments; s += 32) workers += pieces_of(p, line, s, least + warp);
#pragma unroll
  for (int d = 16; d > 0; d /= 2) workers += __shfl_xor_sync(0xffffffffu, workers, d);
  if (lane == 0) shared.fits[warp] = least + warp <= limit && workers <= spread_workers(p);
  __syncthreads();
  unsigned fits = __ballot_sync(0xffffffffu, shared.fits[lane]);
  if (fits == 0) return nullptr;
  int64_t most = least + __ffs(fits) - 1;
  Scan pieces = scan<kThreads>(tid < line.segments ? pieces_of(p, line, tid, most) : 0, shared.sums);
  if (tid < line.segments) shared.spread[tid] = int32_t(pieces.before);
  if (tid == 0) shared.spread[line.segments] = int32_t(pieces.sum);
  __syncthreads();
  return shared.spread;
}

template <int kThreads>
__device__ __forceinline__ int32_t prefix_cost_of_all(const PlanParams& p, PlanShared<kThreads>& shared) {
  PrefixLoad own{};
  if (threadIdx.x == 0) shared.longest = 0;
  for (int32_t node = threadIdx.x; node < node_count(p); node += kThreads) {
    PrefixLoad load = load_of(p, node);
    own = {own.rest + load.rest, own.tiles + load.tiles, at_least(own.longest, load.longest)};
  }
  const int64_t rest = scan<kThreads>(own.rest, shared.sums).sum;
  raise(&shared.longest, own.longest);
  const int64_t tiles = scan<kThreads>(own.tiles, shared.sums).sum;
  return prefix_cost(p, {rest, tiles, shared.longest});
}

template <int kThreads>
__device__ __forceinline__ void plan_block(PlanParams p, PlanShared<kThreads>& shared) {
  static_assert(kThreads > kMaxWorkers && kThreads > kMaxRounds, "a thread for every cut");
  int w = threadIdx.x;
  if (has_levels(p) && p.levels.tree.header->prefixes > 0) p.cost.prefix = prefix_cost_of_all(p, shared);
  bool overflow;
  Line line = build_line<kThreads>(p, shared, &overflow);
  line.spread = spread<kThreads>(p, line, shared);

  if (line.rounds > 1) {
    if (w <= line.rounds) shared.round_begin[w] = w < line.rounds ? round_begin(p, line, w) : line.total;
    line.round_begin = shared.round_begin;
    __syncthreads();
  }
  if (w <= p.workers) {
    shared.cut[w] = cut_before(p, line, w, line.rounds > 1 ? walk_rounds(p, line, w) : w * line.slice);
  }
  int32_t* last_round = p.worker_indptr + (line.rounds - 1) * p.workers;
  __syncthreads();
  Cut cut{};
  Count step{};
  if (w <= p.workers) cut = shared.cut[w];
  if (w >= 1 && w <= p.workers) step = count_cut(shared.cut[w - 1], cut);
  Scan counts = scan<kThreads>(pack(step), shared.sums);
  Count count = unpack(counts.before + pack(step));
  if (w <= p.workers) {
    shared.count[w] = count;
    shared.indptr[w] = first_item(cut, count);
    last_round[w] = shared.indptr[w];
    if (step.openers) shared.first_slot[count.openers - 1] = slot_before_opener(count);
  }
  PlanHeader header = make_header(p, line, unpack(counts.sum), overflow);
  if (w == 0) *p.header = header;
  __syncthreads();

  if (w < p.workers && is_inside(cut) && !same_split(cut, shared.cut[w + 1])) {
    int32_t merge = count.openers - 1;
    store(p.merges + merge, merge_at(p, line, cut, count, shared.first_slot[merge]));
  }
  for (int32_t i = w; i < header.items; i += kThreads) {
    if (p.chunk_tiles > 0) {
      Unit u = unit_at(line, i);
      Segment segment = segment_of(p, line, u);
      store(p.items + i, chunk_item(p, line, u, segment));
      WorkItem merge;
      int32_t index;
      if (chunk_merge(p, line, u, segment, &merge, &index)) store(p.merges + index, merge);
      continue;
    }
    Piece piece = whole(i);
    Count before{};
    if (i >= shared.indptr[0]) {  // before the last round no segment is cut
      int32_t worker = last_not_above(shared.indptr, p.workers, i);
      before = shared.count[worker];
      piece = piece_between(shared.cut[worker], shared.count[worker], shared.cut[worker + 1],
                            shared.count[worker + 1], i - shared.indptr[worker],
                            shared.indptr[worker + 1] - shared.indptr[worker]);
    }
    store(p.items + i, item_of(p, line, piece));
    if (has_levels(p)) note_cuts(p, piece, before);
  }
  if (has_levels(p)) {
    if (w == 0) {
      note_cuts(p, whole(p.kv_heads * line.segments), unpack(counts.sum));
      *p.levels_for_run = p.levels;
    }
    for (int32_t i = w; i < header.places; i += kThreads) find_parts(p, i);
  }
}

}  // namespace fi::smxx
