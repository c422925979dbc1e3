// Algorithm 1 of the FlashInfer paper (arXiv 2501.01005), for `python -m benchmarks.plan_sim`: one common KV
// chunk, items in descending order, each to the least loaded worker. Row tiles, pruning and costs are our
// planner's.
#include <algorithm>
#include <functional>
#include <queue>
#include <utility>
#include <vector>

#include "schedule.h"

namespace {

struct Piece {
  fi::WorkItem item;
  int64_t cost;
};

}  // namespace

// result: cost of the busiest worker, items, partial states, merges
extern "C" void paper_plan(const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests,
                           int32_t kv_heads, int32_t group, int32_t workers, int32_t q_wide, int32_t q_narrow,
                           int32_t tile_kv, int64_t* result) {
  using namespace fi;
  PlanParams p{};
  p.qo_indptr = qo_indptr, p.kv_len = kv_len, p.num_requests = num_requests, p.kv_heads = kv_heads,
  p.group = group;
  p.tile_q_wide = q_wide, p.tile_q_narrow = q_narrow, p.tile_kv = tile_kv, p.causal = 1;
  p.cost = costs_for(kRoomSm80);

  std::vector<Segment> segments;
  int64_t tiles = 0;
  for (int32_t r = 0; r < num_requests; ++r) {
    for (int64_t i = 0, n = segment_count(p, r); i < n; ++i) {
      segments.push_back(segment_at(p, r, int32_t(i)));
      tiles += segments.back().tiles;
    }
  }
  int32_t chunk = int32_t(at_least(ceil_div(tiles * kv_heads, workers), 1));

  std::vector<Piece> pieces;
  int64_t slots = 0, merges = 0;
  for (int32_t head = 0; head < kv_heads; ++head) {
    for (const Segment& s : segments) {
      bool split = s.tiles > chunk;
      merges += split;
      for (int32_t begin = 0; begin == 0 || begin < s.tiles; begin += chunk) {
        int32_t end = std::min(s.tiles, begin + chunk);
        pieces.push_back({make_item(p, s, head, begin, end, split ? int32_t(slots++) : -1),
                          item_cost(p.cost, s.wide) + int64_t(end - begin) * tile_cost(p.cost, s.wide)});
      }
    }
  }
  std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.cost > b.cost; });

  using Load = std::pair<int64_t, int32_t>;
  std::priority_queue<Load, std::vector<Load>, std::greater<Load>> least;
  for (int32_t w = 0; w < workers; ++w) least.push({0, w});
  std::vector<std::vector<WorkItem>> queues(workers);
  int64_t busiest = 0;
  for (const Piece& piece : pieces) {
    auto [load, w] = least.top();
    least.pop();
    queues[w].push_back(piece.item);
    busiest = std::max(busiest, load + piece.cost);
    least.push({load + piece.cost, w});
  }
  std::vector<WorkItem> items;  // what a plan buffer would hold
  items.reserve(pieces.size());
  for (const auto& queue : queues) items.insert(items.end(), queue.begin(), queue.end());
  result[0] = busiest, result[1] = int64_t(items.size()), result[2] = slots, result[3] = merges;
}
