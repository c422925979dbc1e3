// The cost model of the planner: the one home of its numbers. Units are arbitrary; only ratios matter.
#pragma once
#include "params.h"
#include "tiles.h"

namespace fi {

// cost of a work item = item_cost + KV tiles * tile_cost. item: load Q, fill the pipeline, store. narrow,
// wide: one KV tile against a row tile.
FI_HD constexpr Costs costs_for(int32_t room) {
  // H100, head dim 128, 128 keys a tile: a wide tile 1.7 us; a narrow one 3.0 us where all workers have such,
  // less beside wide ones, which leave memory to them. Items: by trial, docs/kernels-sm90.md
  if (room == kRoomSm90) return {8, 5, 20, 6, 8};
  return {6, 4, 6, 6, 6};
}
FI_HD constexpr int32_t item_cost(const Costs& c, bool wide) { return wide ? c.wide_item : c.narrow_item; }
// of_prefix: of composable formats. Such a tile is read while other workers read theirs, and by few.
FI_HD constexpr int32_t tile_cost(const Costs& c, bool wide, bool of_prefix = false) {
  return !wide ? c.narrow : of_prefix ? c.prefix : c.wide;
}

constexpr int32_t kMinTiles = 1;   // a row tile is never cut into pieces of fewer KV tiles
constexpr int32_t kMinSlice = 16;  // workers stay idle rather than get less than this

constexpr int32_t kWidestTile = 6;
constexpr int32_t kPrefixCosts = 4;  // from Costs::prefix upwards that are tried, see prefix_cost()
// The longest item that is never cut. No worker exceeds max(mean, kMinSlice) by more than this.
FI_HD constexpr int32_t uncut_cost(const Costs& c) {
  return (c.narrow_item > c.wide_item ? c.narrow_item : c.wide_item) + (2 * kMinTiles - 1) * kWidestTile;
}

// Fewer units than workers: each unit gets workers of its own if none then exceeds slice + its item's cost;
// with wide units, slice + slice / kSpreadSlack + its item's cost.
constexpr int32_t kSpreadSlack = 16;
constexpr int32_t kSpreadTries = 32;  // one warp of the device planner each

FI_HD constexpr bool fits(const Costs& c) {
  return c.narrow <= kWidestTile && c.wide <= kWidestTile &&
         c.prefix + kPrefixCosts - 1 <= kMinSlice / kMinTiles;
}
static_assert(fits(costs_for(kRoomCpu)) && fits(costs_for(kRoomSm80)) && fits(costs_for(kRoomSm90)),
              "kWidestTile");
// Two cuts inside one tile then lie at least kMinTiles apart: numbering relies on their being distinct.
static_assert(kMinTiles >= 1 && kMinSlice >= kMinTiles * kWidestTile,
              "slices may not be shorter than a piece");

// Shared prefixes, in bytes of traffic of one KV head between multiprocessors and L2: what a prefix reads
// once instead of once a request against what joining partial states costs. A prefix's further row tiles are
// not counted.
struct PrefixPrices {
  int64_t key;     // a key and its value, read
  int64_t state;   // a partial state of each row of a query token, written and read, and its part in the join
  int64_t prefix;  // the work item of one
  int64_t least;   // what all prefixes of a batch save, or it has none
  int64_t cached;  // keys of all prefixes, if they stay in L2 whoever reads them
};
FI_HD constexpr PrefixPrices prefix_prices(int64_t group, int64_t kv_heads, int64_t head_dim_qk,
                                           int64_t head_dim_vo) {
  constexpr int64_t kItemKeys = 256;              // an item costs as much as reading so many keys
  constexpr int64_t kLeast = 32'000'000;          // 4 us of an H100's L2: the join is waited for
  constexpr int64_t kCached = 40'000'000;         // of an H100's 50 MB
  int64_t key = 2 * (head_dim_qk + head_dim_vo);  // 16-bit elements
  return {key, 4 * 4 * group * (head_dim_vo + 1), kItemKeys * key, kLeast / kv_heads, kCached / kv_heads};
}

// Keys of prefixes that stay in L2 come out of memory once even if all read them, and out of L2 while others
// come out of memory, at a rate of 2 to 5: as far as these take longer nothing is gained. shared: what would
// not be read again, others: all besides, bytes.
FI_HD constexpr int64_t hidden_by_memory(int64_t shared, int64_t others) {
  return others * 3 / 2 < shared ? others * 3 / 2 : shared;
}

}  // namespace fi
