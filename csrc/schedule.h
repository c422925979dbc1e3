// The planner's arithmetic, shared by the host and the device planner so that they cannot drift.
//
// The row tiles of one KV head ("segments") are laid end to end, each as long as its cost; kv_heads copies of
// that line follow each other. Worker w owns [w * slice, (w + 1) * slice). A cut inside a segment falls
// between two KV tiles and splits it. Every number of an item or merge is a closed form of the cuts, so all
// can be written at once.
//
// Many wide segments are dealt out in rounds: the line is cut into parts, and in each part every worker has a
// slice. So all workers are at neighbouring segments at a time, which share their keys, and those stay in the
// L2 cache. Before the last round cuts fall between segments; each is moved the less the more it was moved in
// the rounds before, so that a worker's load is never further than one segment from its share, and the last
// round evens out.
//
// Composable formats: the line is made of nodes. A node is a request, as far as its prefixes leave it keys,
// or a prefix with the rows of all its requests: num_requests + its number in the tree. Rows with prefixes
// have partial states in several nodes. The first piece of such a unit writes to rows of its segment, others
// to slots as usual, and all are joined place by place. Executors do not count requests: work items name a
// prefix by its number alone, ~i, so that a captured run follows plans of any number of requests.
#pragma once
#include "cost.h"
#include "tiles.h"

namespace fi {

constexpr int32_t kMaxKvLen = 1 << 30;  // tokens; keeps tile arithmetic within int32
constexpr int32_t kMaxWorkers = 512;    // one thread of the device planner each
constexpr int32_t kMaxRounds = max_rounds_for(kRoomSm90);

// Divisions are of numbers that are not negative. On a GPU those of 64 bits are calls of one function,
// because the planner runs once a step and waits for its instructions more than for anything else.
FI_HD_CALL int64_t quotient(int64_t a, int64_t b) { return int64_t(uint64_t(a) / uint64_t(b)); }
FI_HD int64_t ceil_div(int64_t a, int64_t b) { return quotient(a + b - 1, b); }
FI_HD int32_t quotient32(uint32_t a, uint32_t b) { return int32_t(a / b); }
FI_HD int32_t ceil_div32(uint32_t a, uint32_t b) { return int32_t((a + b - 1) / b); }

template <class A, class B>
FI_HD auto at_least(A x, B floor) {
  return x < floor ? floor : x;
}
template <class A, class B>
FI_HD auto at_most(A x, B limit) {
  return x > limit ? limit : x;
}

// Index of the last of n ascending values that is <= x. values[0] <= x must hold.
template <class T>
FI_HD int32_t last_not_above(const T* values, int32_t n, T x) {
  int32_t low = 0, high = n;
  while (high - low > 1) {
    int32_t middle = low + (high - low) / 2;
    if (values[middle] <= x)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// A row tile of one KV head, or one chunk of it when chunk_tiles is set.
struct Segment {
  int32_t node;
  int32_t row_begin;
  int32_t tile_begin;  // KV tiles [tile_begin, tile_begin + tiles)
  int32_t tiles;
  int32_t wide;    // 0 or 1: the executor's code for it; batch invariant: always 1
  int32_t chunk;   // place in its row tile
  int32_t chunks;  // of its row tile; 1: not chunked
  int32_t rows;    // of those with keys in other nodes; 0: they have none there
  int32_t level;
};

struct Rows {  // the packed rows of a node
  int32_t tokens, kv_len;
  int32_t rows;
  int32_t wide;      // more than one narrow tile
  int32_t kv_begin;  // keys before it are of other nodes
  int32_t level;
  int32_t position;  // of the first query token
  int32_t shared;    // the rows have keys in other nodes
};

FI_HD bool has_levels(const PlanParams& p) { return p.levels.tree.header != nullptr; }
FI_HD int32_t node_count(const PlanParams& p) {
  return p.num_requests + (has_levels(p) ? p.levels.tree.header->prefixes : 0);
}

// Every row of a prefix sees all its keys: the position is behind them.
FI_HD Rows rows_of_prefix(const PlanParams& p, const Prefix& prefix) {
  int32_t rows = prefix.tokens * p.group;
  return {prefix.tokens,   prefix.kv_end, rows,          rows > p.tile_q_narrow,
          prefix.kv_begin, prefix.depth,  prefix.kv_end, 1};
}

// Lengths read on the device cannot be refused: negative ones count as 0, others are clamped to int32.
FI_HD Rows rows_of(const PlanParams& p, int32_t node) {
  if (node >= p.num_requests) return rows_of_prefix(p, p.levels.tree.prefixes[node - p.num_requests]);
  int64_t tokens = at_least(int64_t(p.qo_indptr[node + 1]) - p.qo_indptr[node], 0);
  int32_t kv_len = int32_t(at_most(at_least(p.kv_len[node], 0), kMaxKvLen));
  int32_t rows = int32_t(at_most(tokens * p.group, INT32_MAX));
  Rows r{int32_t(at_most(tokens, INT32_MAX)), kv_len, rows, rows > p.tile_q_narrow, 0, 0, 0, 0};
  r.position = r.kv_len - r.tokens;
  int32_t deepest = has_levels(p) ? p.levels.tree.prefix_of[node] : -1;
  if (deepest >= 0) {
    const Prefix& prefix = p.levels.tree.prefixes[deepest];
    r.kv_begin = prefix.kv_end;
    r.level = prefix.depth + 1;
    r.shared = 1;
  }
  return r;
}

FI_HD int32_t row_tiles(const PlanParams& p, const Rows& r) {
  return r.wide ? ceil_div32(r.rows, p.tile_q_wide) : r.rows > 0;
}

// In p.list; lengths read on the device may lead past its end.
FI_HD int64_t line_of(const PlanParams& p, int32_t request, int32_t index) {
  int64_t before = (int64_t(p.qo_indptr[request]) - p.qo_indptr[0]) * p.group;
  return tile_line(request, int32_t(at_most(at_least(before, 0), INT32_MAX)), p.tile_q_wide, index);
}

FI_HD bool fits_list(const PlanParams& p, int32_t request, const Rows& r) {
  return ceil_div32(r.kv_len, p.tile_kv) <= p.list.width &&
         line_of(p, request, row_tiles(p, r) - 1) < p.list.lines;
}

// KV tiles that any row from row_begin to row_last may see, widened to whole tiles. With a list those are its
// first, second, ...: a segment begins with number 0.
FI_HD Segment row_tile(const PlanParams& p, int32_t node, const Rows& r, int32_t index) {
  int32_t width = r.wide ? p.tile_q_wide : p.tile_q_narrow;
  int32_t row_begin = index * width, rows = at_most(width, r.rows - row_begin);
  if (p.list.counts) {
    int64_t line = line_of(p, node, index);
    return {node, row_begin, 0, line < p.list.lines ? p.list.counts[line] : 0, r.wide, 0, 1, 0, 0};
  }
  int32_t tile_begin = quotient32(r.kv_begin, p.tile_kv), high = r.kv_len;
  if (p.window > 0) {
    int32_t first = at_least(r.position + quotient32(row_begin, p.group), 0);
    tile_begin = quotient32(at_least(first - p.window + 1, 0), p.tile_kv);
  }
  if (p.causal) high = at_least(r.position + quotient32(row_begin + rows - 1, p.group) + 1, 0);
  high = at_least(at_most(high, r.kv_len), r.kv_begin);
  int32_t wide = r.wide || p.chunk_tiles > 0;
  return {node, row_begin,           tile_begin, ceil_div32(high, p.tile_kv) - tile_begin, wide, 0,
          1,    r.shared ? rows : 0, r.level};
}

// Chunks of a narrow tile lie on multiples of chunk_tiles of the request's own keys, whatever the rest of the
// batch.
FI_HD Segment chunk_of(const PlanParams& p, Segment tile, int32_t chunk) {
  if (p.chunk_tiles <= 0 || tile.tiles == 0) return tile;
  int32_t first = quotient32(tile.tile_begin, p.chunk_tiles);
  int32_t tile_end = tile.tile_begin + tile.tiles;
  tile.chunk = chunk;
  tile.chunks = ceil_div32(tile_end, p.chunk_tiles) - first;
  tile.tile_begin = int32_t(at_least((first + chunk) * int64_t(p.chunk_tiles), tile.tile_begin));
  tile.tiles = int32_t(at_most((first + chunk + 1) * int64_t(p.chunk_tiles), tile_end)) - tile.tile_begin;
  return tile;
}

FI_HD int32_t segment_count(const PlanParams& p, int32_t node) {
  Rows r = rows_of(p, node);
  if (r.rows == 0) return 0;
  if (p.list.counts && !fits_list(p, node, r)) return INT32_MAX;  // more than fit: the plan is empty
  if (r.wide) return row_tiles(p, r);
  return chunk_of(p, row_tile(p, node, r, 0), 0).chunks;
}

// index: of the row tile in its node, or of the chunk in a narrow one
FI_HD Segment segment_at(const PlanParams& p, int32_t node, int32_t index) {
  Rows r = rows_of(p, node);
  return r.wide ? row_tile(p, node, r, index) : chunk_of(p, row_tile(p, node, r, 0), index);
}

FI_HD bool is_prefix(const PlanParams& p, int32_t node) { return has_levels(p) && node >= p.num_requests; }

FI_HD int64_t cost_of(const PlanParams& p, bool wide, bool of_prefix, int32_t tiles) {
  return item_cost(p.cost, wide) + int64_t(tiles) * tile_cost(p.cost, wide, of_prefix);
}
FI_HD int64_t segment_cost(const PlanParams& p, const Segment& s) {
  return cost_of(p, s.wide, is_prefix(p, s.node), s.tiles);
}

// The cost line, and where its tables can be read.
struct Line {
  const int64_t* start;      // [segments + 1] of one KV head
  const int32_t* node;       // [segments]
  const int32_t* tile;       // [segments]
  int32_t segments;          // of one KV head
  int32_t chunked_segments;  // of them, those of row tiles with several chunks: each has a slot
  int32_t chunked_tiles;     // row tiles with several chunks: each has a merge
  int32_t state_rows;        // partial states of segments
  const int32_t* spread;     // [segments + 1] workers of one KV head before each; null: cut by cost
  int32_t wide;              // segments that are
  int32_t most_tiles[2];     // of a segment: of narrow ones, of wide ones
  int32_t rounds;
  const int64_t* round_begin;  // [rounds + 1] on the line; set where rounds > 1
  int64_t slice, total;
};

FI_HD void measure(Line* line, const PlanParams& p) {
  line->total = line->start[line->segments] * p.kv_heads;
  line->slice = at_least(ceil_div(line->total, p.workers), kMinSlice);
  line->rounds = 1;
  if (line->wide == 0 || p.chunk_tiles > 0) return;
  // A round's ends and the cuts in it are moved by at most half a segment each: so they keep their order.
  int64_t longest = at_least(cost_of(p, true, has_levels(p), line->most_tiles[1]),
                             cost_of(p, false, false, line->most_tiles[0]));
  int64_t rounds = quotient(line->total, (longest + kMinSlice) * p.workers + longest);
  line->rounds = int32_t(at_least(at_most(rounds, p.max_rounds), 1));
}

// Spreading: segment s gets pieces_of(s, most) workers, and `most` is the least cost of KV tiles a worker
// that needs no more than spread_workers() workers a KV head. Only the values from spread_least() up to
// spread_limit() are tried: below it is hopeless, above it cutting by cost is better.
FI_HD int32_t spread_workers(const PlanParams& p) { return quotient32(p.workers, p.kv_heads); }

FI_HD int64_t spread_least(const PlanParams& p, const Line& line) {
  int64_t items =
      int64_t(line.wide) * p.cost.wide_item + int64_t(line.segments - line.wide) * p.cost.narrow_item;
  int64_t tiles = line.start[line.segments] - items;
  return at_least(ceil_div(tiles, spread_workers(p)), at_least(kMinSlice - p.cost.narrow_item, 1));
}

// Below spread_least(): do not spread.
FI_HD int64_t spread_limit(const PlanParams& p, const Line& line) {
  if (p.chunk_tiles > 0 || line.segments == 0 || line.segments > spread_workers(p)) return -1;
  // wide: a worker of its own reads keys in step with its neighbours, and needs no merge
  int64_t above = line.wide > 0 ? line.slice / kSpreadSlack : 0;
  return at_most(line.slice + above, spread_least(p, line) + kSpreadTries - 1);
}

// Cost of segment s, and of its item alone and a KV tile: so its KV tiles are read off the line.
struct Price {
  int64_t all;
  int32_t item, tile;
};

FI_HD Price price_of(const PlanParams& p, const Line& line, int32_t s) {
  bool wide = rows_of(p, line.node[s]).wide, of_prefix = is_prefix(p, line.node[s]);
  return {line.start[s + 1] - line.start[s], item_cost(p.cost, wide), tile_cost(p.cost, wide, of_prefix)};
}
FI_HD int64_t tiles_of(const Price& price) { return quotient(price.all - price.item, price.tile); }

// Composable formats: the row tiles of a prefix lie one behind the other on the line. If they are as long as
// a whole number of slices, all are cut at the same keys, workers read these at the same time, and memory
// gives them once; else each row tile reads all of them anew, where they do not fit the L2 cache. What a tile
// of a prefix costs is not known that well: of what it may cost, that is taken which fits best.
struct PrefixLoad {
  int64_t rest;     // cost of one KV head's items, without what follows
  int64_t tiles;    // of prefixes, times their wide row tiles
  int32_t longest;  // tiles of a prefix with several row tiles
};

FI_HD PrefixLoad load_of(const PlanParams& p, int32_t node) {
  Rows r = rows_of(p, node);
  int64_t tiles = row_tiles(p, r);
  if (tiles == 0) return {};
  Segment s = row_tile(p, node, r, int32_t(quotient(tiles, 2)));  // of most requests the only one
  if (!s.wide || !is_prefix(p, node)) return {tiles * segment_cost(p, s), 0, 0};
  return {tiles * p.cost.wide_item, tiles * s.tiles, tiles > 1 ? s.tiles : 0};
}

FI_HD int32_t prefix_cost(const PlanParams& p, const PrefixLoad& all) {
  constexpr int32_t kParts = 64;  // of a slice: less does not matter
  int64_t best = kParts;
  int32_t cost = p.cost.prefix;
  if (all.longest == 0) return cost;
  for (int32_t c = p.cost.prefix; c < p.cost.prefix + kPrefixCosts; ++c) {
    int64_t slice = at_least(quotient((all.rest + all.tiles * c) * p.kv_heads, p.workers), kMinSlice);
    int64_t length = p.cost.wide_item + int64_t(all.longest) * c;
    int64_t past = length - quotient(length, slice) * slice;
    int64_t off = quotient(kParts * at_most(past, slice - past), slice);
    if (off < best) best = off, cost = c;
  }
  return cost;
}

FI_HD int32_t pieces_of(const PlanParams& p, const Line& line, int32_t s, int64_t most) {
  Price price = price_of(p, line, s);
  int64_t widest = has_levels(p) ? at_least(price.tile, kWidestTile) : kWidestTile;
  int64_t tiles = price.all - price.item, limit = quotient(tiles, kMinTiles * widest);
  return int32_t(at_least(at_most(ceil_div(tiles, most), limit), 1));
}

// Unit = kv_head * segments + segment.
struct Unit {
  int32_t head, segment;
};

FI_HD Unit unit_at(const Line& line, int32_t unit) {
  int32_t head = quotient32(unit, line.segments);
  return {head, unit - head * line.segments};
}

FI_HD Segment segment_of(const PlanParams& p, const Line& line, const Unit& u) {
  return segment_at(p, line.node[u.segment], line.tile[u.segment]);
}

// The cut before KV tile `tile` of a unit; 0: before the whole unit.
struct Cut {
  int32_t unit, tile;
};

FI_HD Cut spread_cut_before(const PlanParams& p, const Line& line, int32_t w) {
  int32_t workers = line.spread[line.segments];
  if (w >= workers * p.kv_heads) return {p.kv_heads * line.segments, 0};
  int32_t head = quotient32(w, workers);
  int32_t s = last_not_above(line.spread, line.segments, w - head * workers);
  int32_t piece = w - head * workers - line.spread[s], pieces = line.spread[s + 1] - line.spread[s];
  int32_t unit = head * line.segments + s;
  if (piece == 0) return {unit, 0};
  return {unit, int32_t(quotient(tiles_of(price_of(p, line, s)) * piece, pieces))};
}

// Where a unit begins on the cost line.
FI_HD int64_t begin_of(const Line& line, int32_t unit) {
  if (line.segments == 0) return 0;
  Unit u = unit_at(line, unit);
  return u.head * line.start[line.segments] + line.start[u.segment];
}

// Where x lies, 0 <= x < total.
struct OnLine {
  int32_t unit, segment;
  int64_t into;
};

FI_HD OnLine place_of(const Line& line, int64_t x) {
  int64_t length = line.start[line.segments];
  int32_t head = int32_t(quotient(x, length));
  int64_t y = x - head * length;
  int32_t s = last_not_above(line.start, line.segments, y);
  return {head * line.segments + s, s, y - line.start[s]};
}

// The unit whose begin is nearest to x, 0 <= x <= total.
FI_HD int32_t nearest_unit(const PlanParams& p, const Line& line, int64_t x) {
  if (x >= line.total) return p.kv_heads * line.segments;
  OnLine at = place_of(line, x);
  int64_t rest = line.start[at.segment + 1] - line.start[at.segment] - at.into;
  return at.unit + (at.into > rest ? 1 : 0);
}

FI_HD int64_t round_begin(const PlanParams& p, const Line& line, int32_t round) {
  return begin_of(line, nearest_unit(p, line, quotient(line.total, line.rounds) * round));
}

// Writes where worker w begins in the rounds before the last, and returns where on the line it should begin
// in the last one.
FI_HD int64_t walk_rounds(const PlanParams& p, const Line& line, int32_t w) {
  int64_t have = 0, x = 0;  // have: what the workers before w got in the rounds so far
  for (int32_t round = 0; round < line.rounds; ++round) {
    x = line.round_begin[round] + quotient(line.round_begin[round + 1] * w, p.workers) - have;
    if (round + 1 == line.rounds) break;
    int32_t unit = nearest_unit(p, line, x);
    if (w < p.workers) p.worker_indptr[round * p.workers + w] = unit;
    have += begin_of(line, unit) - line.round_begin[round];
  }
  return x;
}

// Where worker w begins; in rounds, in the last one. x: the place on the line it should be. Cuts never
// decrease with w, and two cuts inside one unit differ.
FI_HD Cut cut_before(const PlanParams& p, const Line& line, int32_t w, int64_t x) {
  if (line.spread) return spread_cut_before(p, line, w);
  if (p.chunk_tiles > 0) return {nearest_unit(p, line, x), 0};  // segments stay whole
  if (x >= line.total) return {p.kv_heads * line.segments, 0};
  OnLine at = place_of(line, x);
  Price price = price_of(p, line, at.segment);
  int64_t tile = ceil_div(at_least(at.into - price.item, 0), price.tile);
  if (tile < kMinTiles) return {at.unit, 0};
  if (tiles_of(price) - tile < kMinTiles) return {at.unit + 1, 0};
  return {at.unit, int32_t(tile)};
}

// Of the cuts 1..w: those inside a unit, and those that are the first inside theirs.
struct Count {
  int32_t inside, openers;
};

FI_HD bool is_inside(const Cut& c) { return c.tile > 0; }
FI_HD bool same_split(const Cut& a, const Cut& b) { return is_inside(a) && is_inside(b) && a.unit == b.unit; }
FI_HD Count count_cut(const Cut& before, const Cut& c) {
  return {is_inside(c), is_inside(c) && !same_split(before, c)};
}

FI_HD int32_t first_item(const Cut& c, const Count& n) { return c.unit + n.inside; }
FI_HD int32_t slot_after(const Count& n) { return n.inside + n.openers - 1; }
FI_HD int32_t slot_before_opener(const Count& n) { return n.inside + n.openers - 2; }

FI_HD WorkItem make_item(const PlanParams& p, const Segment& s, int32_t head, int32_t begin, int32_t end,
                         int32_t slot) {
  bool first = begin == 0 && s.chunk == 0 && s.rows == 0;
  int32_t flags = (s.wide ? kWideTile : 0) | (first ? kFirstPiece : 0);
  int32_t origin = s.tile_begin;
  int32_t request = s.node < p.num_requests ? s.node : ~(s.node - p.num_requests);
  return {request, s.row_begin, head,   (origin + begin) * p.tile_kv, (origin + end) * p.tile_kv,
          slot,    flags,       s.level};
}

// Composable formats: rows with keys in other nodes are joined place by place instead, and nobody has merges
// of theirs.
FI_HD WorkItem make_merge(const PlanParams& p, const Segment& s, int32_t head, int32_t first_slot,
                          int32_t end_slot) {
  int32_t before = p.levels.first_slot, node = s.rows > 0 ? -1 : s.node;
  return {node, s.row_begin, head, before + first_slot, before + end_slot, -1, s.wide ? kWideTile : 0, 0};
}

// KV tiles [begin, end) of a unit, as far as it has them.
struct Piece {
  int32_t unit, begin, end, slot;
};

FI_HD Piece whole(int32_t unit) { return {unit, 0, INT32_MAX, -1}; }

// Item number `index` of `count` of the worker between two neighbouring cuts. The rest of a unit that the
// worker before began comes last: pieces that begin with a unit's first keys are then read in step, and rests
// are reached when the others get there.
FI_HD Piece piece_between(const Cut& left, const Count& left_count, const Cut& right,
                          const Count& right_count, int32_t index, int32_t count) {
  if (is_inside(left)) index = index + 1 < count ? index + 1 : 0;
  Piece piece = whole(left.unit + index);
  if (piece.unit == right.unit) {  // right.tile > 0, or this item would be the next worker's
    piece.end = right.tile;
    piece.slot = slot_before_opener(right_count);
  }
  if (index == 0 && is_inside(left)) {
    piece.begin = left.tile;
    piece.slot = slot_after(left_count);
  }
  return piece;
}

// As in WorkItem::slot.
FI_HD int32_t piece_slot(const PlanParams& p, const Line& line, const Unit& u, const Segment& segment,
                         const Piece& piece) {
  if (segment.rows > 0 && piece.begin == 0)
    return -2 - (u.head * line.state_rows + p.levels.segment_rows[u.segment]);
  return piece.slot < 0 ? -1 : p.levels.first_slot + piece.slot;
}

FI_HD WorkItem item_of(const PlanParams& p, const Line& line, const Piece& piece) {
  Unit u = unit_at(line, piece.unit);
  Segment segment = segment_of(p, line, u);
  int32_t slot = piece_slot(p, line, u, segment, piece);
  return make_item(p, segment, u.head, piece.begin, at_most(piece.end, segment.tiles), slot);
}

// Composable formats: the first slot of a unit's and how many cuts it has are read off what is written for it
// and for the next unit. n: cuts of the units before.
FI_HD void note_cuts(const PlanParams& p, const Piece& piece, const Count& n) {
  if (piece.begin == 0) p.levels.unit_cuts[piece.unit] = CutCount::of(n.inside, n.openers).packed;
}

// Composable formats: where the rows of place number i are, node by node.
FI_HD void find_parts(const PlanParams& p, int32_t i) {
  const PrefixTree& tree = p.levels.tree;
  Place place = tree.places[i];
  int32_t node = place.request, token = place.token - p.qo_indptr[place.request];
  int32_t prefix = tree.prefix_of[place.request];
  for (int32_t k = 0; k < p.levels.count; ++k) {
    Part part{-1, 0};
    if (node >= 0) {
      part = {p.node_segment[node], 2 * token * p.group + rows_of(p, node).wide};
      node = prefix >= 0 ? p.num_requests + prefix : -1;
      if (prefix >= 0) {
        token = i - tree.prefixes[prefix].first;
        prefix = tree.prefixes[prefix].parent;
      }
    }
    p.levels.parts[i * p.levels.count + k] = part;
  }
}

// The merge of the unit whose last inside cut is `closer`.
FI_HD WorkItem merge_at(const PlanParams& p, const Line& line, const Cut& closer, const Count& count,
                        int32_t first_slot) {
  Unit u = unit_at(line, closer.unit);
  return make_merge(p, segment_of(p, line, u), u.head, first_slot, slot_after(count) + 1);
}

// Batch invariant: every unit is an item; chunked row tiles own slots whatever the cuts.
FI_HD int32_t slot_of(const PlanParams& p, const Line& line, const Unit& u) {
  return u.head * line.chunked_segments + p.chunk_slot[u.segment];
}

FI_HD WorkItem chunk_item(const PlanParams& p, const Line& line, const Unit& u, const Segment& segment) {
  int32_t slot = segment.chunks > 1 ? slot_of(p, line, u) : -1;
  return make_item(p, segment, u.head, 0, segment.tiles, slot);
}

// Whether this unit is the chunk that writes its row tile's merge; if so *merge and *index are set.
FI_HD bool chunk_merge(const PlanParams& p, const Line& line, const Unit& u, const Segment& segment,
                       WorkItem* merge, int32_t* index) {
  if (segment.chunks == 1 || segment.chunk > 0) return false;
  int32_t first_slot = slot_of(p, line, u);
  *merge = make_merge(p, segment, u.head, first_slot, first_slot + segment.chunks);
  *index = u.head * line.chunked_tiles + p.chunk_merge[u.segment];
  return true;
}

// Row tiles with several chunks: {its slots, its merges} that begin at this segment.
FI_HD Count chunk_count(const Segment& s) { return {s.chunks > 1, s.chunks > 1 && s.chunk == 0}; }

FI_HD PlanHeader make_header(const PlanParams& p, const Line& line, const Count& cuts, bool overflow) {
  bool chunked = p.chunk_tiles > 0;
  int32_t units = p.kv_heads * line.segments;
  PlanHeader header{};
  header.items = units + cuts.inside;
  header.merges = chunked ? p.kv_heads * line.chunked_tiles : cuts.openers;
  header.slots = chunked ? p.kv_heads * line.chunked_segments : cuts.inside + cuts.openers;
  header.segments = line.segments;
  header.slice = line.slice;
  header.total = line.total;
  header.error = overflow;
  header.rounds = line.rounds;
  if (has_levels(p)) {
    header.state_rows = line.state_rows;
    header.places = overflow ? 0 : p.levels.tree.header->tokens;
    header.prefix_cost = p.cost.prefix;
  }
  return header;
}

}  // namespace fi
