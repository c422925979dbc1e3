// The persistent kernel: each CTA is a worker and walks its items; per item load, mma, store.
//
// A wide tile gives every warp 16 of 64 rows and all tokens of a KV tile; a narrow tile gives every warp the same 16
// rows and a quarter of the tokens, and the warps' states meet in shared memory at the end.
//
// K and V tiles alternate in one ring of slots (K0 V0 K1 V1 ...). Step h waits for its own tile, passes one barrier
// (everybody has left step h - 1), starts the copy of step h + kSlots - 1 into the slot just left, then computes.
#pragma once
#include "load.cuh"
#include "mma.cuh"
#include "softmax.cuh"
#include "store.cuh"

namespace fi::sm80 {

struct Smem {
  uint32_t q, ring;
  TokenPlace* places;  // [2][kTileKv]
  float* exchange;     // all of it again, once the item's copies and products are done

  __device__ explicit Smem(unsigned char* base)
      : q(smem_address(base)), ring(q + kQBytes + 2 * kTileKv * sizeof(TokenPlace)),
        places(reinterpret_cast<TokenPlace*>(base + kQBytes)),
        exchange(reinterpret_cast<float*>(base)) {}
};

// Copies of one item, in the order K0 V0 K1 V1 ...; TokenPlaces run one tile ahead of the copies, the page table one
// more ahead in a register.
struct TileStream {
  const Smem& smem;
  const Element *k, *v;
  const KVCache& kv;
  PageReader pages;
  int first_token;  // of the first tile
  int half_tiles;   // 2 x tiles
  int issued = 0;
  TokenPlace next;  // of tile issued / 2 + 1, this thread's token

  __device__ TileStream(const Smem& s, const AttentionParams& p, const PageReader& reader, int kv_head, int first,
                        int tiles)
      : smem(s), k(static_cast<const Element*>(p.kv.k) + kv_head * p.kv.k_head),
        v(static_cast<const Element*>(p.kv.v) + kv_head * p.kv.v_head), kv(p.kv), pages(reader), first_token(first),
        half_tiles(2 * tiles) {
    if (threadIdx.x < kTileKv) smem.places[threadIdx.x] = pages.find(first_token + threadIdx.x);
    next = look_up(1);
    __syncthreads();
  }

  __device__ __forceinline__ TokenPlace look_up(int tile) const {
    if (threadIdx.x >= kTileKv || 2 * tile >= half_tiles) return {-1, 0};
    return pages.find(first_token + tile * kTileKv + threadIdx.x);
  }

  // Starts the copy of the next half tile, if any is left; always commits, so that groups count steps.
  __device__ __forceinline__ void issue() {
    if (issued < half_tiles) {
      int tile = issued / 2;
      const TokenPlace* places = smem.places + (tile & 1) * kTileKv;
      uint32_t slot = smem.ring + issued % kSlots * kSlotBytes;
      if (issued % 2 == 0) {
        // places of tile - 1 are no longer read: its V copy was started before the last barrier
        if (threadIdx.x < kTileKv) smem.places[((tile + 1) & 1) * kTileKv + threadIdx.x] = next;
        next = look_up(tile + 2);
        load_tokens<LayoutQk>(slot, places, k, kv.k_page, kv.k_token);
      } else {
        load_tokens<LayoutVo>(slot, places, v, kv.v_page, kv.v_token);
      }
    }
    ++issued;
    copy_async_commit();
  }
};

template <int kWarpsKv> __device__ __forceinline__ void process(const AttentionParams& p, const Args& args,
                                                                const WorkItem& item, const Smem& smem) {
  constexpr int kRows = 16 * kWarps / kWarpsKv;
  constexpr int kTokens = kTileKv / kWarpsKv;  // a warp's share of a KV tile
  int warp = threadIdx.x / 32;
  int warp_row = kWarpsKv == 1 ? 16 * warp : 0;
  int warp_token = kWarpsKv == 1 ? 0 : kTokens * warp;

  int q_first = p.batch.qo_indptr[item.request];
  int q_len = p.batch.qo_indptr[item.request + 1] - q_first;
  int kv_len = p.batch.kv_len[item.request];
  int row_end = min(q_len * p.group, item.row_begin + kRows);
  if (row_end <= item.row_begin) return;

  RowState state;
  state.begin(args, item.request, kv_len, q_len, p.group, item.kv_head, item.row_begin + warp_row, row_end);

  // Key ranges grow with the position, so the first and the last row bound the tile's.
  int tokens_before = kv_len - q_len;
  int head = item.kv_head * p.group;
  KeyRange low = Variant::keys(args, {item.request, head, tokens_before + item.row_begin / p.group, kv_len});
  KeyRange high = Variant::keys(args, {item.request, head, tokens_before + (row_end - 1) / p.group, kv_len});
  int key_begin = max(low.begin, 0), key_end = min(high.end, kv_len);
  int first = key_begin / kTileKv * kTileKv;
  if (!(item.flags & kFirstPiece)) first = max(first, item.kv_begin);
  int last = min(key_end, item.kv_end);
  int tiles = last > first ? (last - first + kTileKv - 1) / kTileKv : 0;

  float o[kDimVo / 8][4] = {};
  if (tiles > 0) {
    load_queries<kRows>(smem.q, p, q_first, item.kv_head, item.row_begin, row_end);
    TileStream stream(smem, p, PageReader(p, item.request, key_begin, key_end), item.kv_head, first, tiles);
#pragma unroll
    for (int i = 0; i < kSlots - 1; ++i) {
      stream.issue();
      if (i % 2 == 1) __syncthreads();  // the places of the next tile are in shared memory
    }
    QueryFragment q;
    for (int tile = 0; tile < tiles; ++tile) {
      int token = first + tile * kTileKv + warp_token;
      int slot = 2 * tile % kSlots;
      copy_async_wait<kSlots - 2>();
      __syncthreads();
      stream.issue();
      if (tile == 0) q.load(smem.q, warp_row);
      float s[kTokens / 8][4];
      scores<kTokens>(s, q, smem.q, warp_row, smem.ring + slot * kSlotBytes, warp_token);
      state.step<kTokens>(s, o, args, p.scale, token);

      slot = (2 * tile + 1) % kSlots;
      copy_async_wait<kSlots - 2>();
      __syncthreads();
      stream.issue();
      accumulate<kTokens>(o, s, smem.ring + slot * kSlotBytes, warp_token);
    }
    copy_async_wait<0>();
  }
  state.finish(p.scale);
  __syncthreads();  // the ring and Q are free again
  if constexpr (kWarpsKv == 1) {
    store_wide(p, args, item, q_first, item.row_begin + warp_row, row_end, state, o);
  } else {
    exchange_warps(smem.exchange, state, o);
    store_narrow(p, args, item, q_first, row_end, smem.exchange);
    __syncthreads();  // before the next item's copies land in the exchange
  }
}

__global__ void __launch_bounds__(kThreads, kTiles.ctas_per_sm)
    attention_kernel(const __grid_constant__ AttentionParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  Smem smem(shared);
  Args args = *reinterpret_cast<const Args*>(p.variant_args);
  int end = p.worker_indptr[blockIdx.x + 1];
  for (int i = p.worker_indptr[blockIdx.x]; i < end; ++i) {
    WorkItem item = p.items[i];
    if (item.flags & kWideTile) {
      process<1>(p, args, item, smem);
    } else {
      process<kWarps>(p, args, item, smem);
    }
  }
}

}  // namespace fi::sm80
