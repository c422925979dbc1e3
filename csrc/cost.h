// The cost model of the planner: the one home of its numbers. Units are arbitrary; only ratios matter.
#pragma once
#include "params.h"

namespace fi {

// cost of a work item = kItemCost + KV tiles * tile_cost(wide)
constexpr int32_t kItemCost = 6;        // load Q, fill the pipeline, store
constexpr int32_t kNarrowTileCost = 4;  // one KV tile against a narrow row tile
constexpr int32_t kWideTileCost = 6;    // and against a wide one
constexpr int32_t kMinTiles = 1;        // a row tile is never cut into pieces of fewer KV tiles
constexpr int32_t kMinSlice = 16;       // workers stay idle rather than get less than this

FI_HD constexpr int32_t tile_cost(bool wide) { return wide ? kWideTileCost : kNarrowTileCost; }

constexpr int32_t kWidestTile = kWideTileCost > kNarrowTileCost ? kWideTileCost : kNarrowTileCost;
// The longest item that is never cut. No worker exceeds max(mean, kMinSlice) by more than this.
constexpr int32_t kUncutCost = kItemCost + (2 * kMinTiles - 1) * kWidestTile;

// Fewer units than workers: each unit gets workers of its own if none then exceeds slice + kSpreadSlack.
constexpr int32_t kSpreadSlack = kItemCost;
constexpr int32_t kSpreadTries = 32;  // one warp of the device planner each
static_assert(kSpreadSlack + kWidestTile <= kUncutCost, "spreading keeps the load bound");

// Two cuts inside one tile then lie at least kMinTiles apart: numbering relies on their being distinct.
static_assert(kMinTiles >= 1 && kMinSlice >= kMinTiles * kWidestTile,
              "slices may not be shorter than a piece");

}  // namespace fi
