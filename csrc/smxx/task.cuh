// One work item, made ready by one thread in shared memory. Threads read it there whenever they need it: held
// in registers it would not fit beside a wide tile.
#pragma once
#include "../state.h"
#include "spec.cuh"

#include <new>
#include <type_traits>

namespace fi::smxx {

// Where a KV token lives; page < 0: outside the keys of this tile, filled with zeros and never read.
struct TokenPlace {
  int32_t page, offset;
};

// Where the KV tiles of a piece lie: one behind the other or, in plans that skip, where a list says.
template <bool kList>
struct KvTiles {
  __device__ __forceinline__ void find_list(const AttentionParams&, const WorkItem&, int) {}
  // Whether all rows see all keys of the tile; if not known, no.
  __device__ __forceinline__ bool whole(int) const { return false; }
  __device__ __forceinline__ int first_of(int first_token, int tile) const {
    return first_token + tile * kTileKv;
  }
};

template <>
struct KvTiles<true> {
  const int32_t* list;  // [tiles] ascending

  __device__ __forceinline__ void find_list(const AttentionParams& p, const WorkItem& item, int q_first) {
    int rows_before = (q_first - p.batch.qo_indptr[0]) * p.group;
    int64_t line = tile_line(item.request, rows_before, kTileQ, item.row_begin / kTileQ);
    list = p.tile_list + line * p.tile_list_width + item.kv_begin / kTileKv;
  }
  __device__ __forceinline__ int first_of(int, int tile) const {
    return ListedTile{list[tile]}.tile() * kTileKv;
  }
  __device__ __forceinline__ bool whole(int tile) const { return ListedTile{list[tile]}.whole(); }
};

// The query tokens of a task: its request's, one behind the other, or places of a prefix.
template <bool kLevels>
struct QueryTokens {
  __device__ __forceinline__ const Prefix* find_prefix(const AttentionParams&, int) { return nullptr; }
  __device__ __forceinline__ bool scattered() const { return false; }
  __device__ __forceinline__ int token_at(int place) const { return place; }
  __device__ __forceinline__ Row row_at(const AttentionParams&, int, int) const { return {}; }
};

template <>
struct QueryTokens<true> {
  const Place* places = nullptr;  // null: the request's

  __device__ __forceinline__ const Prefix* find_prefix(const AttentionParams& p, int request) {
    if (request >= 0) return nullptr;
    places = p.places;
    return p.prefixes + ~request;
  }
  __device__ __forceinline__ bool scattered() const { return places; }
  __device__ __forceinline__ int token_at(int place) const { return places ? places[place].token : place; }
  __device__ __forceinline__ Row row_at(const AttentionParams& p, int place, int head) const {
    return row_of_token(p.batch, places[place].request, head, places[place].token);
  }
};

struct Task : KvTiles<kTileList>, QueryTokens<kLevels> {
  const Element *k, *v;    // of the KV head
  const int32_t* entries;  // the request's row of the page table
  int32_t request, kv_head;
  int32_t q_first;  // first query token of the request; of a prefix: its first place
  int32_t q_pos;    // its position among the keys
  int32_t kv_len;
  int32_t begin, end;  // packed rows of the tile; none: nothing to do
  int32_t slot;        // of the partial state; kLevels: its first row; negative: straight to the output
  int32_t wide;
  int32_t key_begin, key_end;  // keys that some row of the tile may see
  int32_t first_token, tiles;  // KV tiles of this piece
  uint32_t per_group;          // ceil(2^32 / group)
  int32_t last;                // batch invariant: end of the piece's keys; the task is one chunk of them,
  int32_t first_chunk;         // 1: the first of them

  // kShared: whether the item may be a prefix's.
  template <bool kShared = kLevels>
  __device__ Task(const AttentionParams& p, const Args& args, const WorkItem& item,
                  std::bool_constant<kShared> = {})
      : request(item.request),
        kv_head(item.kv_head),
        begin(item.row_begin),
        slot(kLevels ? first_state(p, item.slot) : item.slot),
        wide(item.flags & kWideTile),
        per_group(0xffffffffu / p.group + 1) {
    const Prefix* prefix = nullptr;
    if constexpr (kShared) prefix = find_prefix(p, item.request);
    if (prefix) request = prefix->request;
    k = static_cast<const Element*>(p.kv.k) + kv_head * p.kv.k_head;
    v = static_cast<const Element*>(p.kv.v) + kv_head * p.kv.v_head;
    int64_t start = request;
    if (p.batch.starts) {
      start = p.batch.starts_are_64 ? static_cast<const int64_t*>(p.batch.starts)[request]
                                    : static_cast<const int32_t*>(p.batch.starts)[request];
    }
    entries = p.batch.table + start * p.batch.start_stride;
    q_first = p.batch.qo_indptr[request];
    int q_len = p.batch.qo_indptr[request + 1] - q_first;
    kv_len = p.batch.kv_len[request];
    if (prefix) {
      q_first = prefix->first;
      q_len = prefix->tokens;
      kv_len = prefix->kv_end;
    }
    q_pos = kv_len - q_len;
    end = min(q_len * p.group, begin + (wide ? kTileQ : kTiles.q_narrow));
    if (end <= begin) return;
    if (prefix) {  // rows of many requests, each with a range of its own
      key_begin = prefix->kv_begin;
      key_end = prefix->kv_end;
    } else {  // key ranges grow with the position, so the first and the last row bound the tile's
      key_begin = Variant::keys(args, row(p, begin)).begin;
      key_end = Variant::keys(args, row(p, end - 1)).end;
    }
    if constexpr (kTileList) {
      find_list(p, item, q_first);
      tiles = (item.kv_end - item.kv_begin) / kTileKv;
      first_token = tiles > 0 ? token_of_tile(0) : 0;
      return;
    }
    first_token = key_begin / kTileKv * kTileKv;
    if (!(item.flags & kFirstPiece)) first_token = max(first_token, item.kv_begin);
    last = min(key_end, item.kv_end);
    first_chunk = 1;
    set_tiles();
  }

  // The first token of a KV tile of the piece.
  __device__ __forceinline__ int token_of_tile(int tile) const { return first_of(first_token, tile); }

  __device__ __forceinline__ void set_tiles() {
    int stop = last;
    if constexpr (kBatchInvariant) stop = min(stop, (first_token / kChunk + 1) * kChunk);
    tiles = stop > first_token ? (stop - first_token + kTileKv - 1) / kTileKv : 0;
  }
  __device__ __forceinline__ bool last_chunk() const { return first_token + tiles * kTileKv >= last; }
  __device__ __forceinline__ void next_chunk() {
    first_token += tiles * kTileKv;
    first_chunk = 0;
    set_tiles();
  }

  // packed / group by a multiplication; exact while packed < 2^32 / group, beyond any request's rows
  __device__ __forceinline__ int token_of(const AttentionParams& p, int packed) const {
    return p.group == 1 ? packed : __umulhi(packed, per_group);
  }
  __device__ __forceinline__ int head_of(const AttentionParams& p, int packed) const {
    return kv_head * p.group + packed - token_of(p, packed) * p.group;
  }
  __device__ __forceinline__ int query_token(const AttentionParams& p, int packed) const {
    return token_at(q_first + token_of(p, packed));
  }
  // rows past the end repeat the last one
  __device__ __forceinline__ Row row(const AttentionParams& p, int packed) const {
    packed = min(packed, end - 1);
    if (scattered()) return row_at(p, q_first + token_of(p, packed), head_of(p, packed));
    return own_row(p, packed);
  }
  // Of a request's own keys.
  __device__ __forceinline__ Row own_row(const AttentionParams& p, int packed) const {
    packed = min(packed, end - 1);
    return {request, head_of(p, packed), q_pos + token_of(p, packed),
            kv_len,  kv_len - q_pos,     q_first + token_of(p, packed)};
  }
  __device__ __forceinline__ TokenPlace find(const AttentionParams& p, int token) const {
    if (token < key_begin || token >= key_end) return {-1, 0};
    int page = token / p.kv.page_size;
    int entry = entries[int64_t(page) * p.batch.entry_step];
    return {p.batch.entries_are_slots ? entry / p.kv.page_size : entry, token - page * p.kv.page_size};
  }
};

}  // namespace fi::smxx
