// Everything that crosses from host to executor. Plain data: no torch, no CUDA headers.
// Beside each pointer: [shape], unit, and what "empty" looks like.
#pragma once
#include <stdint.h>

#if defined(__CUDACC__)
#define FI_HD __host__ __device__ __forceinline__
#define FI_HD_CALL inline __host__ __device__ __noinline__
#else
#define FI_HD inline
#define FI_HD_CALL inline
#endif

namespace fi {

// One piece of attention: a tile of packed query rows of one KV head against a range of KV tokens.
// A packed row is (query token, query head of the group): row = token_in_request * group + head_in_group.
struct WorkItem {
  int32_t request;    // index into the batch; composable formats: ~i for prefix i of the tree
  int32_t row_begin;  // first packed row of the tile, counted from the request's first row
  int32_t kv_head;
  int32_t
      kv_begin;  // KV tokens [kv_begin, kv_end), multiples of tile_kv; clamped to the true kv_len when read.
  int32_t kv_end;  // Plans with a TileList: places in the row tile's list, times tile_kv
  int32_t slot;    // partial state to write, -1: the tile was not split, write the output directly;
                   // composable formats: -2 - the first row of states that segment_rows counts
  int32_t flags;   // ItemFlag
  int32_t level;   // composable formats: prefixes above the node; 0 for a single format
};
enum ItemFlag : int32_t {
  kWideTile = 1,    // tile_q_wide rows; otherwise tile_q_narrow
  kFirstPiece = 2,  // lowest KV range of its tile: begins where the variant says, even below kv_begin
};
// A merge is a WorkItem too: kv_begin = first slot, kv_end = one past the last slot, slot = -1. Composable
// formats: request -1, if its rows are joined place by place instead.

// First 64 bytes of a plan buffer. Counts are of this plan; capacities are the planner's.
struct PlanHeader {
  int32_t items;
  int32_t merges;
  int32_t slots;
  int32_t segments;    // row tiles of one KV head (batch invariant: times their chunks)
  int64_t slice;       // cost given to one worker
  int64_t total;       // cost of the whole batch
  int32_t error;       // 0, or 1: more segments than max_segments, the plan is empty
  int32_t rounds;      // worker w has the items of slices w, workers + w, ... of worker_indptr, in all rounds
  int32_t state_rows;  // composable formats: partial states of one KV head's segments
  int32_t places;      // of them, query tokens whose rows are joined place by place
  int32_t prefix_cost;  // what a tile of a prefix was taken to cost
  int32_t reserved[3];
};

// BlockSparse as an executor sees it. Entry p of request r lies at
//   table[start(r) + p * entry_step],  start(r) = (starts ? starts[r] : r) * start_stride
struct Batch {
  const int32_t* qo_indptr;  // [num_requests + 1] query tokens, offsets
  const int32_t* kv_len;     // [num_requests] tokens, 0: no keys
  const int32_t* table;      // flat; page ids, or token slots when entries_are_slots
  const void* starts;        // [num_requests] int32 or int64 (starts_are_64); null: row r of a block table
  int64_t start_stride;      // entries
  int32_t entry_step;        // entries from one page to the next
  int32_t starts_are_64;
  int32_t entries_are_slots;  // entry / page_size is the page id
  int32_t num_requests;
};

// Element (p, t, h, d) of K lies at k + p * k_page + t * k_token + h * k_head + d, in elements; V likewise.
struct KVCache {
  void* k;
  void* v;
  int64_t k_page, k_token, k_head;
  int64_t v_page, v_token, v_head;
  int32_t page_size;  // tokens
  int32_t num_pages;
};

// Composable formats. A prefix: query tokens of several requests against keys that all of these begin with,
// read once for all of them. What is left of each request's keys begins where its deepest prefix ends.
struct Prefix {
  int32_t first, tokens;     // its requests' query tokens: places [first, first + tokens) of the tree
  int32_t kv_begin, kv_end;  // keys, multiples of tile_kv; those before kv_begin are its parent's
  int32_t request;           // the one of them whose page table is read
  int32_t requests;          // how many they are
  int32_t parent;            // a prefix before it in the tree; -1: none
  int32_t depth;             // prefixes above it
};
struct Place {  // a query token that reads prefixes
  int32_t token, request;
};
struct PrefixHeader {
  int32_t prefixes, tokens;  // in use, of PrefixTree::prefixes and places
  int64_t saved;             // KV tokens of a head that are not read again: sum of (requests - 1) * keys
};
// No token has a place twice, and its request's prefixes all hold it; the places of a prefix lie within its
// parent's.
struct PrefixTree {  // all null: a single format
  PrefixHeader* header;
  Prefix* prefixes;    // [max_requests]
  int32_t* prefix_of;  // [max_requests] deepest prefix of each request, -1: none
  Place* places;       // [max_shared_tokens]
};

// Where a place's rows are among those of one of its nodes, see schedule.h.
struct Part {
  int32_t segment;  // the node's first, -1: no more nodes
  int32_t row;      // 2 * the token's first packed row in the node + whether the node is wide
};
// Composable formats, as planner and executors see them.
struct Levels {
  PrefixTree tree;        // all null: a single format
  Part* parts;            // [max_shared_tokens, count] of each place: its request, then prefixes upwards
  int32_t* segment_rows;  // [max_segments] partial states of KV head 0 before its own; -1: none of its own
  int32_t* unit_cuts;     // [kv_heads * max_segments + 1] CutCounts before each unit of all heads
  int32_t count;          // at most, of a row: prefixes and the rest
  int32_t first_slot;     // slots before it hold the states that segment_rows counts
};

constexpr int kMaxVariantBytes = 64;

struct AttentionParams {
  const void* q;            // [tokens, q_heads, head_dim_qk]
  void* out;                // [tokens, q_heads, head_dim_vo]
  float* lse;               // [tokens, q_heads] natural log, contiguous; null: not wanted
  int64_t q_token, q_head;  // strides in elements
  int64_t o_token, o_head;
  KVCache kv;
  Batch batch;
  const PlanHeader* header;
  const int32_t* worker_indptr;  // [rounds * workers + 1] into items
  const WorkItem* items;
  const WorkItem* merges;
  // Partial states, [slots, partial_rows]; batch invariant: then [workers, q_wide] of what each works on.
  float* partial_o;      // [.., head_dim_vo] normalised within the piece; batch invariant: a sum, as in State
  float* partial_lse;    // log2, -inf: no keys; batch invariant: State::max
  float* partial_sum;    // batch invariant: State::sum; otherwise null
  int64_t worker_state;  // the first of worker 0
  int32_t partial_rows;  // rows of the largest tile that is split
  int32_t tokens;        // of q and out; those past the last request are left alone
  int32_t workers;
  int32_t kv_heads;
  int32_t group;                                            // query heads per KV head
  float scale;                                              // natural units: logit = scale * q.k
  alignas(8) unsigned char variant_args[kMaxVariantBytes];  // the generated struct Args
  // [items + merges, 2] begin and end of each, nanoseconds of one clock; read in builds with kProfile alone,
  // otherwise null. It and what follows come last: kernels find the other fields by their offsets.
  uint64_t* profile;
  const int32_t* tile_list;  // TileList::tiles; read in builds with kTileList alone, otherwise null
  int32_t tile_list_width;
  // Where the plan lies; read in builds with kLevels alone, otherwise null.
  const Levels* levels;
  const Prefix* prefixes;  // of levels->tree, as is what follows: known before levels is read
  const Place* places;
};

// KV append: token i goes to slot_mapping[i] (= page * page_size + offset); negative: skipped.
struct AppendParams {
  const void* k;                             // [tokens, kv_heads, head_dim_qk]
  const void* v;                             // [tokens, kv_heads, head_dim_vo]
  int64_t k_token, k_head, v_token, v_head;  // strides in elements
  KVCache kv;
  const int64_t* slot_mapping;  // [tokens]
  int32_t tokens;
  int32_t kv_heads;
  int32_t bytes_qk, bytes_vo;  // bytes of one head's K and V row
  int32_t element_bytes;
};

struct Costs {  // see cost.h
  int32_t narrow_item, narrow, wide_item, wide, prefix;
};

// The KV tiles that a row of a row tile sees, for plans that leave out the others. Which line a row tile has:
// tile_line() in tiles.h. Tile numbers are of the request's keys.
struct TileList {
  int32_t* counts;       // [lines] null: the plan has no list
  int32_t* tiles;        // [lines, width] ascending ListedTiles, as many as the line counts
  int32_t lines, width;  // capacities
};

// Input and output of a planner, host or device. All output pointers lie in the plan buffer.
struct PlanParams {
  const int32_t* qo_indptr;  // [num_requests + 1]
  const int32_t* kv_len;     // [num_requests] upper bounds are fine
  int32_t num_requests;
  int32_t kv_heads;
  int32_t group;
  int32_t workers;
  int32_t tile_q_wide, tile_q_narrow, tile_kv;
  int32_t causal;      // 1: keys after the row's own position are pruned
  int32_t window;      // keys (q - window, q] are kept; 0: no window
  int32_t max_rounds;  // that the executor can walk, and worker_indptr holds
  Costs cost;
  int32_t chunk_tiles;  // batch invariant: requests of one narrow tile are cut every so many KV tiles; 0: off
  int32_t max_segments;  // capacities
  int32_t max_items;
  int32_t max_slots;
  int32_t max_merges;
  PlanHeader* header;
  int32_t* worker_indptr;  // [max_rounds * workers + 1]
  WorkItem* items;         // [max_items]
  WorkItem* merges;        // [max_merges]
  // scratch of the device planner, and what plan.show() reads
  int64_t* segment_start;  // [max_segments + 1] cost line of one KV head
  int32_t* segment_node;   // [max_segments]
  int32_t* segment_tile;   // [max_segments] row tile in its request, or chunk of a chunked one
  int32_t* chunk_slot;     // [max_segments] slot in KV head 0, -1: not chunked; null unless chunk_tiles > 0
  int32_t* chunk_merge;    // [max_segments] merge in KV head 0, likewise
  TileList list;           // written before the planner runs
  Levels levels;           // its tree likewise
  Levels* levels_for_run;  // where executors find them
  int32_t* node_segment;   // [2 * max_requests] first segment of each node
};

// Input of a tile lister: where its planner's list lies, and what the mask is asked with.
struct ListParams {
  PlanParams plan;
  alignas(8) unsigned char variant_args[kMaxVariantBytes];
};

}  // namespace fi
