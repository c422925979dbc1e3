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
  if (room == kRoomSm90) return {8, 5, 20, 6};
  return {6, 4, 6, 6};
}
FI_HD constexpr int32_t item_cost(const Costs& c, bool wide) { return wide ? c.wide_item : c.narrow_item; }
FI_HD constexpr int32_t tile_cost(const Costs& c, bool wide) { return wide ? c.wide : c.narrow; }

constexpr int32_t kMinTiles = 1;   // a row tile is never cut into pieces of fewer KV tiles
constexpr int32_t kMinSlice = 16;  // workers stay idle rather than get less than this

constexpr int32_t kWidestTile = 6;
// The longest item that is never cut. No worker exceeds max(mean, kMinSlice) by more than this.
FI_HD constexpr int32_t uncut_cost(const Costs& c) {
  return (c.narrow_item > c.wide_item ? c.narrow_item : c.wide_item) + (2 * kMinTiles - 1) * kWidestTile;
}

// Fewer units than workers: each unit gets workers of its own if none then exceeds slice + its item's cost;
// with wide units, slice + slice / kSpreadSlack + its item's cost.
constexpr int32_t kSpreadSlack = 16;
constexpr int32_t kSpreadTries = 32;  // one warp of the device planner each

FI_HD constexpr bool fits(const Costs& c) { return c.narrow <= kWidestTile && c.wide <= kWidestTile; }
static_assert(fits(costs_for(kRoomCpu)) && fits(costs_for(kRoomSm80)) && fits(costs_for(kRoomSm90)),
              "kWidestTile");
// Two cuts inside one tile then lie at least kMinTiles apart: numbering relies on their being distinct.
static_assert(kMinTiles >= 1 && kMinSlice >= kMinTiles * kWidestTile,
              "slices may not be shorter than a piece");

}  // namespace fi
