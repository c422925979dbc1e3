#include "plan.h"

#include <vector>

#include "schedule.h"

namespace fi {
namespace {

// Lays the segments of one KV head end to end. False: they do not fit.
bool build_line(const PlanParams& p, Line* line) {
  int64_t cost = 0, segments = 0;
  bool fits = true;
  for (int32_t node = 0; node < node_count(p) && fits; ++node) {
    int64_t count = segment_count(p, node);
    fits = segments + count <= p.max_segments;
    if (has_levels(p)) p.node_segment[node] = int32_t(segments);
    for (int32_t i = 0; fits && i < count; ++i, ++segments) {
      Segment segment = segment_at(p, node, i);
      p.segment_start[segments] = cost;
      p.segment_node[segments] = node;
      p.segment_tile[segments] = i;
      cost += segment_cost(p, segment);
      int32_t& most = line->most_tiles[segment.wide];
      most = at_least(most, segment.tiles);
      line->wide += segment.wide;
      if (has_levels(p)) {
        p.levels.segment_rows[segments] = segment.rows > 0 ? line->state_rows : -1;
        line->state_rows += segment.rows;
      }
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
    line->most_tiles[0] = line->most_tiles[1] = line->wide = line->state_rows = 0;
  }
  line->start = p.segment_start;
  line->node = p.segment_node;
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

void plan_host(const PlanParams& given) {
  PlanParams p = given;
  if (has_levels(p)) {
    PrefixLoad all{};
    for (int32_t node = 0; node < node_count(p); ++node) {
      PrefixLoad load = load_of(p, node);
      all = {all.rest + load.rest, all.tiles + load.tiles, at_least(all.longest, load.longest)};
    }
    p.cost.prefix = prefix_cost(p, all);
  }
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
  auto write_item = [&](int32_t at, const Piece& piece, const Count& before) {
    p.items[at] = item_of(p, line, piece);
    if (has_levels(p)) note_cuts(p, piece, before);
  };
  for (int32_t unit = 0; unit < left.unit; ++unit) write_item(unit, whole(unit), {});
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
      write_item(i, piece_between(left, left_count, right, right_count, i - begin, end - begin), left_count);
    }
    last_round[w] = end;
    left = right;
    left_count = right_count;
  }
  *p.header = make_header(p, line, left_count, !fits);
  if (has_levels(p)) {
    note_cuts(p, whole(p.kv_heads * line.segments), left_count);
    for (int32_t i = 0; i < p.header->places; ++i) find_parts(p, i);
    *p.levels_for_run = p.levels;
  }
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
