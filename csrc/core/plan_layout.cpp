#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "plan.h"
#include "schedule.h"

namespace fi {
namespace {

template <class... T>
void require(bool holds, const T&... words) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << words);
  throw std::invalid_argument(text.str());
}

void require_between(const char* name, int64_t value, int64_t low, int64_t high) {
  require(low <= value && value <= high, "expected ", name, " from ", low, " to ", high, ", got ", value);
}

void check_config(const PlanConfig& c) {
  constexpr int64_t kAny = INT32_MAX, kMaxGroup = 128;  // the largest group that is tested
  require_between("kv_heads", c.kv_heads, 1, kAny);
  require_between("q_heads / kv_heads", c.group, 1, kMaxGroup);
  require_between("workers", c.workers, 1, kMaxWorkers);
  require_between("tiles.kv", c.tile_kv, 1, kMaxKvLen);
  require_between("tiles.q_wide", c.tile_q_wide, 1, kMaxKvLen);
  require_between("tiles.q_narrow", c.tile_q_narrow, 0, c.tile_q_wide);
  require(c.room == kRoomCpu || c.room == kRoomSm80 || c.room == kRoomSm90,
          "expected tiles.room 0 (cpu), 80 or 90, got ", c.room);
  require_between("window", c.window, 0, kMaxKvLen);
  require(c.chunk_tiles == 0 || c.chunk_tiles == kChunkTiles, "expected chunk_tiles 0 or ", kChunkTiles,
          ", got ", c.chunk_tiles);  // the GPU's kernels are compiled for it
  require_between("max_requests", c.max_requests, 1, kAny);
  require_between("max_tokens", c.max_tokens, 1, kAny);
  require_between("max_kv_len", c.max_kv_len, 0, kMaxKvLen);
  require(c.chunk_tiles == 0 || c.max_kv_len > 0, "batch_invariant=True needs max_kv_len, got none");
  require(!c.listed || c.max_kv_len > 0, "skip needs max_kv_len, got none");
  require(
      !c.listed || c.chunk_tiles == 0,  // chunks lie on multiples of the keys, not of what is left of them
      "expected batch_invariant or skip, got both");
  require_between("levels", c.levels, 1, 32);
  require(c.levels == 1 || (c.chunk_tiles == 0 && !c.listed && c.window == 0),
          "expected levels, batch_invariant, skip or window, got levels of ", c.levels, " and another");
  require(c.levels == 1 || c.tree.header, "expected a prefix tree with levels of ", c.levels, ", got none");
  require_between("max_shared_tokens", c.max_shared_tokens, 0, c.levels > 1 ? kAny / c.group : 0);
  require(c.max_tokens * c.group <= kAny - c.tile_q_wide,  // the end of a last tile that is not full
          "expected max_tokens * group of at most ", kAny - c.tile_q_wide, ", got ", c.max_tokens, " * ",
          c.group);
  // the GPU finds the token of a packed row by a 32-bit reciprocal of the group (smxx/task.cuh)
  require(c.max_tokens * c.group * c.group < int64_t(1) << 32,
          "expected max_tokens * group^2 below 2^32, got ", c.max_tokens, " * ", c.group, "^2");
}

// Chunks that the keys of one narrow tile can touch; they lie on multiples of the chunk.
int64_t most_chunks(const PlanConfig& c) {
  if (c.chunk_tiles == 0) return 1;
  int64_t chunk = c.chunk_tiles * c.tile_kv;
  int64_t chunks = ceil_div(c.max_kv_len, chunk);
  if (c.window == 0) return chunks;
  int64_t tokens = c.tile_q_narrow / c.group;
  return std::min(chunks, ceil_div(std::max<int64_t>(c.window + tokens - 2, 0), chunk) + 1);
}

void require_items(int64_t most) {
  require(most <= INT32_MAX / 8, "expected fewer than 2^28 work items, got up to ", most,
          ": lower max_tokens, max_requests or max_kv_len");
}

}  // namespace

PlanLayout plan_layout(const PlanConfig& c) {
  check_config(c);
  PlanLayout l{};
  int64_t requests = std::min(c.max_requests, c.max_tokens);  // that have a row
  int64_t narrow = c.tile_q_narrow >= c.group ? requests : 0;
  int64_t chunks = most_chunks(c);
  int64_t tiles = std::min(c.max_tokens * ceil_div(c.group, c.tile_q_wide),
                           (c.max_tokens * c.group + requests * (c.tile_q_wide - 1)) / c.tile_q_wide);
  int64_t shared_rows = c.levels > 1 ? c.max_shared_tokens * c.group * c.levels : 0;  // of one KV head
  if (c.levels > 1) tiles += c.max_requests + shared_rows / c.tile_q_wide;
  l.max_segments = tiles + narrow * (chunks - 1);
  require_items(l.max_segments);  // or the products below could overflow
  if (c.chunk_tiles > 0) {
    l.max_merges = chunks > 1 ? c.kv_heads * narrow : 0;
    l.max_slots = l.max_merges * chunks;
    l.max_items = l.max_segments * c.kv_heads;
  } else {  // a cut makes one more item, and at most two partial states
    l.max_merges = std::min(c.workers - 1, tiles * c.kv_heads);
    l.max_slots = c.workers - 1 + l.max_merges;
    l.max_items = l.max_segments * c.kv_heads + c.workers - 1;
  }
  // A round has a segment and more for each worker.
  int64_t most_rounds = std::max<int64_t>(l.max_segments * c.kv_heads / c.workers, 1);
  l.max_slices = std::min<int64_t>(max_rounds_for(int(c.room)), most_rounds) * c.workers;
  l.first_slot = ceil_div(shared_rows * c.kv_heads, c.tile_q_wide);
  require_items(std::max(l.max_items, l.max_slots));
  require(l.first_slot + l.max_slots <= INT32_MAX / c.tile_q_wide,
          "expected fewer than 2^31 rows of partial states, got up to ", l.first_slot + l.max_slots, " * ",
          c.tile_q_wide, ": lower max_shared_tokens or levels");

  if (c.listed) {
    l.list_lines = tile_lines(c.max_requests, c.max_tokens * c.group, c.tile_q_wide);
    l.list_width = ceil_div(c.max_kv_len, c.tile_kv);
    require(l.list_lines <= INT32_MAX / l.list_width, "expected skip to list fewer than 2^31 KV tiles, got ",
            l.list_lines, " row tiles of up to ", l.list_width,
            ": lower max_tokens, max_requests or max_kv_len");
  }

  int64_t end = 0;
  auto section = [&end](int64_t bytes) {
    int64_t begin = end;
    end = ceil_div(end + bytes, 64) * 64;
    return begin;
  };
  int64_t chunked = c.chunk_tiles > 0 ? l.max_segments : 0;
  section(sizeof(PlanHeader));
  l.worker_indptr = section((l.max_slices + 1) * sizeof(int32_t));
  l.merges = section(l.max_merges * sizeof(WorkItem));
  l.segment_start = section((l.max_segments + 1) * sizeof(int64_t));
  l.segment_node = section(l.max_segments * sizeof(int32_t));
  l.segment_tile = section(l.max_segments * sizeof(int32_t));
  l.chunk_slot = section(chunked * sizeof(int32_t));
  l.chunk_merge = section(chunked * sizeof(int32_t));
  l.items = section(l.max_items * sizeof(WorkItem));
  l.list_counts = section(l.list_lines * sizeof(int32_t));
  l.list_tiles = section(l.list_lines * l.list_width * sizeof(int32_t));
  if (c.levels > 1) {
    l.levels_for_run = section(sizeof(Levels));
    l.node_segment = section(2 * c.max_requests * sizeof(int32_t));
    l.parts = section(c.max_shared_tokens * c.levels * sizeof(Part));
    l.segment_rows = section(l.max_segments * sizeof(int32_t));
    l.unit_cuts = section((l.max_segments * c.kv_heads + 1) * sizeof(int32_t));
  }
  l.bytes = end;
  return l;
}

void check_lengths(const PlanConfig& c, const int32_t* qo_indptr, const int32_t* kv_len,
                   int32_t num_requests) {
  int64_t limit = c.max_kv_len > 0 ? c.max_kv_len : kMaxKvLen;
  require(qo_indptr[0] >= 0, "expected qo_indptr not to be negative, got ", qo_indptr[0], " at its start");
  for (int32_t r = 0; r < num_requests; ++r) {
    require(qo_indptr[r] <= qo_indptr[r + 1], "expected qo_indptr not to decrease, got ", qo_indptr[r],
            " then ", qo_indptr[r + 1], " at request ", r);
    require(kv_len[r] >= 0 && kv_len[r] <= limit, "expected kv_len from 0 to ", limit, ", got ", kv_len[r],
            " at request ", r);
  }
  int64_t tokens = int64_t(qo_indptr[num_requests]) - qo_indptr[0];
  require(tokens <= c.max_tokens, "expected at most ", c.max_tokens, " query tokens (max_tokens), got ",
          tokens);
}

PlanParams plan_params(const PlanConfig& c, const PlanLayout& l, char* buffer, const int32_t* qo_indptr,
                       const int32_t* kv_len, int32_t num_requests) {
  PlanParams p{};
  p.qo_indptr = qo_indptr;
  p.kv_len = kv_len;
  p.num_requests = num_requests;
  p.kv_heads = int32_t(c.kv_heads);
  p.group = int32_t(c.group);
  p.workers = int32_t(c.workers);
  p.tile_q_wide = int32_t(c.tile_q_wide);
  p.tile_q_narrow = int32_t(c.tile_q_narrow);
  p.tile_kv = int32_t(c.tile_kv);
  p.max_rounds = int32_t(l.max_slices / c.workers);
  p.cost = costs_for(int32_t(c.room));
  p.causal = int32_t(c.causal);
  p.window = int32_t(c.window);
  p.chunk_tiles = int32_t(c.chunk_tiles);
  p.max_segments = int32_t(l.max_segments);
  p.max_items = int32_t(l.max_items);
  p.max_slots = int32_t(l.max_slots);
  p.max_merges = int32_t(l.max_merges);
  p.header = reinterpret_cast<PlanHeader*>(buffer);
  p.worker_indptr = reinterpret_cast<int32_t*>(buffer + l.worker_indptr);
  p.merges = reinterpret_cast<WorkItem*>(buffer + l.merges);
  p.segment_start = reinterpret_cast<int64_t*>(buffer + l.segment_start);
  p.segment_node = reinterpret_cast<int32_t*>(buffer + l.segment_node);
  p.segment_tile = reinterpret_cast<int32_t*>(buffer + l.segment_tile);
  if (p.chunk_tiles > 0) {
    p.chunk_slot = reinterpret_cast<int32_t*>(buffer + l.chunk_slot);
    p.chunk_merge = reinterpret_cast<int32_t*>(buffer + l.chunk_merge);
  }
  p.items = reinterpret_cast<WorkItem*>(buffer + l.items);
  if (c.listed) {
    p.list = {reinterpret_cast<int32_t*>(buffer + l.list_counts),
              reinterpret_cast<int32_t*>(buffer + l.list_tiles), int32_t(l.list_lines),
              int32_t(l.list_width)};
  }
  if (c.levels > 1 && num_requests > 1) {  // one request is planned as a single format, and run as one
    p.levels = {c.tree,
                reinterpret_cast<Part*>(buffer + l.parts),
                reinterpret_cast<int32_t*>(buffer + l.segment_rows),
                reinterpret_cast<int32_t*>(buffer + l.unit_cuts),
                int32_t(c.levels),
                int32_t(l.first_slot)};
    p.levels_for_run = reinterpret_cast<Levels*>(buffer + l.levels_for_run);
    p.node_segment = reinterpret_cast<int32_t*>(buffer + l.node_segment);
  }
  return p;
}

}  // namespace fi
