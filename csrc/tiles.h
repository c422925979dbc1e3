// Tile shapes: the one home of every number that planner and executors must agree on.
#pragma once
#include "params.h"

namespace fi {

struct Tiles {
  int32_t q_wide;       // rows of a prefill tile
  int32_t q_narrow;     // rows of a decode tile; a request with at most this many packed rows is narrow
  int32_t kv;           // KV tokens of a tile
  int32_t ctas_per_sm;  // persistent CTAs on one multiprocessor; CPU: workers per thread
};

// Batch invariant: rows are joined from chunks of so many KV tiles, on multiples of them.
constexpr int32_t kChunkTiles = 32;

// Executors, by folder; fi_backend/jit says which one a spec gets.
constexpr int kRoomCpu = 0, kRoomSm80 = 80, kRoomSm90 = 90;

// Slices of a plan that the executor can walk a worker, see schedule.h.
FI_HD constexpr int32_t max_rounds_for(int room) { return room == kRoomSm90 ? 128 : 1; }

// arch: 0 for the CPU executor, else 80, 86, 89, 90, ...
FI_HD constexpr Tiles tiles_for(int room, int arch, int head_dim_qk, int head_dim_vo) {
  int widest = head_dim_qk > head_dim_vo ? head_dim_qk : head_dim_vo;
  if (room == kRoomCpu) return {64, 16, 64, 4};
  if (room == kRoomSm90) {  // 64 rows a warpgroup; as many keys as fit its registers beside the output
    int keys = widest > 192 ? 64 : widest > 128 ? 96 : widest > 96 ? 128 : 160;
    return {128, 64, keys, 1};
  }
  if (widest > 128) return {64, 16, 64, 1};    // 16 rows a warp: 32 would not fit the registers
  bool small_smem = arch == 86 || arch == 89;  // 99 KiB a multiprocessor
  return {128, 16, 64, small_smem ? 1 : 2};
}

// Lines of a TileList. Each row tile has one of its own, found without a sum over the requests before: a
// request skips at most what its last, half full tile leaves. rows_before: packed rows of the requests
// before. index: of the row tile in its request.
FI_HD int64_t tile_line(int32_t request, int32_t rows_before, int32_t q_wide, int32_t index) {
  return int64_t(request) + rows_before / q_wide + index;
}
FI_HD constexpr int64_t tile_lines(int64_t requests, int64_t rows, int64_t q_wide) {
  return requests + rows / q_wide;
}

// Cuts of the units before one: how many, and how many of them are the first of theirs.
struct CutCount {
  int32_t packed;

  FI_HD static CutCount of(int32_t cuts, int32_t openers) { return {cuts << 16 | openers}; }
  FI_HD int32_t cuts() const { return packed >> 16; }
  FI_HD int32_t slots() const { return cuts() + (packed & 0xffff); }  // that they take
};

// An entry of a TileList: 2 * KV tile + whether every row of the row tile sees all of the tile's keys, so
// that the mask need not be asked.
struct ListedTile {
  int32_t entry;

  FI_HD static ListedTile of(int32_t tile, bool whole) { return {2 * tile + whole}; }
  FI_HD int32_t tile() const { return entry >> 1; }
  FI_HD bool whole() const { return entry & 1; }
};

}  // namespace fi
