#include "plan.h"

#include <vector>

#include "schedule.h"

namespace fi {
namespace {

// Lays the segments of one KV head end to end. False: they do not fit.
bool build_line(const PlanParams& p, Line* line) {
  int64_t cost = 0, segments = 0;
  bool fits = true;
  for (int32_t r = 0; r < p.num_requests && fits; ++r) {
    int64_t count = segment_count(p, r);
    fits = segments + count <= p.max_segments;
    for (int32_t i = 0; fits && i < count; ++i, ++segments) {
      Segment segment = segment_at(p, r, i);
      p.segment_start[segments] = cost;
      p.segment_request[segments] = r;
      p.segment_tile[segments] = i;
      cost += segment_cost(p, segment);
      int32_t& most = line->most_tiles[segment.wide];
      most = at_least(most, segment.tiles);
      line->wide += segment.wide;
      if (p.chunk_tiles > 0) {
        Count count = chunk_count(segment);
        p.chunk_slot[segments] = count.inside ? line->chunked_segments : -1;
        p.chunk_merge[segments] = count.openers ? line->chunked_tiles : -1;
        line->chunked_segments += count.inside;
        line->chunked_tiles += count.openers;
      }
    }
  }
  if (!fits) {
    cost = segments = 0;
    line->chunked_segments = line->chunked_tiles = 0;
    line->most_tiles[0] = line->most_tiles[1] = line->wide = 0;
  }
  line->start = p.segment_start;
  line->request = p.segment_request;
  line->tile = p.segment_tile;
  line->segments = int32_t(segments);
  p.segment_start[segments] = cost;
  measure(line, p);
  return fits;
}

// Workers before each segment of one KV head, or nothing if cutting by cost is better.
std::vector<int32_t> spread(const PlanParams& p, const Line& line) {
  int64_t limit = spread_limit(p, line);
  if (limit < 0) return {};
  std::vector<int32_t> before(line.segments + 1);
  for (int64_t most = spread_least(p, line); most <= limit; ++most) {
    for (int32_t s = 0; s < line.segments; ++s) before[s + 1] = before[s] + pieces_of(p, line, s, most);
    if (before[line.segments] <= spread_workers(p)) return before;
  }
  return {};
}

}  // namespace

void plan_host(const PlanParams& p) {
  Line line{};
  bool fits = build_line(p, &line);
  std::vector<int32_t> workers_before = spread(p, line);
  line.spread = workers_before.empty() ? nullptr : workers_before.data();
  std::vector<int64_t> round_begins(line.rounds + 1, line.total);
  for (int32_t round = 0; round < line.rounds; ++round) round_begins[round] = round_begin(p, line, round);
  line.round_begin = round_begins.data();
  auto begin_of_worker = [&](int32_t w) {
    return cut_before(p, line, w, line.rounds > 1 ? walk_rounds(p, line, w) : w * line.slice);
  };
  Cut left = begin_of_worker(0);
  Count left_count{};
  int32_t first_slot = 0;
  for (int32_t unit = 0; unit < left.unit; ++unit) p.items[unit] = item_of(p, line, whole(unit));
  int32_t* last_round = p.worker_indptr + (line.rounds - 1) * p.workers;
  last_round[0] = left.unit;
  for (int32_t w = 1; w <= p.workers; ++w) {
    Cut right = begin_of_worker(w);
    Count step = count_cut(left, right);
    Count right_count{left_count.inside + step.inside, left_count.openers + step.openers};
    if (is_inside(left) && !same_split(left, right)) {
      p.merges[left_count.openers - 1] = merge_at(p, line, left, left_count, first_slot);
    }
    if (step.openers) first_slot = slot_before_opener(right_count);
    int32_t begin = first_item(left, left_count), end = first_item(right, right_count);
    for (int32_t i = begin; p.chunk_tiles == 0 && i < end; ++i) {
      p.items[i] =
          item_of(p, line, piece_between(left, left_count, right, right_count, i - begin, end - begin));
    }
    last_round[w] = end;
    left = right;
    left_count = right_count;
  }
  *p.header = make_header(p, line, left_count, !fits);
  for (int32_t unit = 0; p.chunk_tiles > 0 && unit < p.header->items; ++unit) {
    Unit u = unit_at(line, unit);
    Segment segment = segment_of(p, line, u);
    p.items[unit] = chunk_item(p, line, u, segment);
    WorkItem merge;
    int32_t index;
    if (chunk_merge(p, line, u, segment, &merge, &index)) p.merges[index] = merge;
  }
}

}  // namespace fi
