// Host side of the planner: what is sized when a planner is made, and the planner itself.
#pragma once
#include "params.h"

namespace fi {

// What a planner is made for. Counts and lengths are upper bounds.
struct PlanConfig {
  int64_t kv_heads, group, workers;
  int64_t tile_q_wide, tile_q_narrow, tile_kv;
  int64_t room;         // of the executor, csrc/tiles.h
  int64_t causal;       // 0 or 1
  int64_t window;       // tokens, 0: none
  int64_t chunk_tiles;  // batch invariant, 0: off
  int64_t max_requests, max_tokens;
  int64_t max_kv_len;  // tokens, 0: unbounded (not when batch invariant or listed)
  int64_t listed;      // 0 or 1: KV tiles are those of a TileList
  int64_t levels;      // of composable formats: prefixes above one another, and the rest; 1: a single format
  int64_t max_shared_tokens;  // query tokens with prefixes
  PrefixTree tree;            // of composable formats: where it is written before the planner runs
};

// Capacities, and byte offsets into the plan buffer (64-byte aligned). Items come last of what a planner
// writes, so that a plan made on the host reaches the device in one copy that ends with its last item.
struct PlanLayout {
  int64_t max_segments, max_items, max_slots, max_merges;
  int64_t max_slices;              // of the line: workers, times the rounds there may be
  int64_t list_lines, list_width;  // of the TileList, 0: none
  int64_t worker_indptr, merges, segment_start, segment_node, segment_tile, chunk_slot, chunk_merge, items;
  int64_t list_counts, list_tiles;
  int64_t first_slot;  // composable formats: see Levels
  int64_t levels_for_run, node_segment, parts, segment_rows, unit_cuts;
  int64_t bytes;
};

// Throws std::invalid_argument when the configuration makes no sense or overflows 32-bit counts.
PlanLayout plan_layout(const PlanConfig& config);

// Throws std::invalid_argument when lengths decrease, are negative or exceed the planner's capacities.
void check_lengths(const PlanConfig& config, const int32_t* qo_indptr, const int32_t* kv_len,
                   int32_t num_requests);

// buffer: layout.bytes, 64-byte aligned, where the planner runs
PlanParams plan_params(const PlanConfig& config, const PlanLayout& layout, char* buffer,
                       const int32_t* qo_indptr, const int32_t* kv_len, int32_t num_requests);

// Writes what csrc/smxx/plan.cu writes, byte for byte. Nothing past the counts of the header is touched.
void plan_host(const PlanParams& params);

}  // namespace fi
