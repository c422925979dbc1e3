// Global -> shared: rows of Q, and KV tokens gathered through the page table.
#pragma once
#include "traits.cuh"

namespace fi::sm80 {

// Where a KV token lives; page < 0: outside the keys of this tile, filled with zeros and never read.
struct TokenPlace {
  int32_t page, offset;
};

struct PageReader {
  const int32_t* entries;  // of this request
  int32_t step, page_size, slots;
  int32_t key_begin, key_end;  // keys that some row of the tile may see

  __device__ PageReader(const AttentionParams& p, int request, int begin, int end)
      : step(p.batch.entry_step), page_size(p.kv.page_size), slots(p.batch.entries_are_slots), key_begin(begin),
        key_end(end) {
    int64_t start = request;
    if (p.batch.starts) {
      start = p.batch.starts_are_64 ? static_cast<const int64_t*>(p.batch.starts)[request]
                                    : static_cast<const int32_t*>(p.batch.starts)[request];
    }
    entries = p.batch.table + start * p.batch.start_stride;
  }

  __device__ __forceinline__ TokenPlace find(int token) const {
    if (token < key_begin || token >= key_end) return {-1, 0};
    int page = token / page_size;
    int entry = entries[int64_t(page) * step];
    return {slots ? entry / page_size : entry, token - page * page_size};
  }
};

// One K or V tile into a ring slot. base already points at the KV head.
template <class Layout>
__device__ __forceinline__ void load_tokens(uint32_t slot, const TokenPlace* places, const Element* base,
                                            int64_t page_stride, int64_t token_stride) {
  constexpr int kCopies = kTileKv * Layout::kChunks / kThreads;
#pragma unroll 8
  for (int i = 0; i < kCopies; ++i) {
    int index = threadIdx.x + i * kThreads;
    int row = index / Layout::kChunks, chunk = index % Layout::kChunks;
    TokenPlace at = places[row];
    bool valid = at.page >= 0;
    const Element* src = valid ? base + at.page * page_stride + at.offset * token_stride + chunk * 8 : base;
    copy_async_16(slot + Layout::offset(row, chunk), src, valid);
  }
}

// Packed query rows [row_begin, row_begin + kRows); rows from row_end on repeat the last one, so they stay finite.
template <int kRows>
__device__ __forceinline__ void load_queries(uint32_t smem_q, const AttentionParams& p, int first_token, int kv_head,
                                             int row_begin, int row_end) {
  constexpr int kTotal = kRows * LayoutQk::kChunks;
  const Element* q = static_cast<const Element*>(p.q);
  for (int index = threadIdx.x; index < kTotal; index += kThreads) {
    int row = index / LayoutQk::kChunks, chunk = index % LayoutQk::kChunks;
    int packed = min(row_begin + row, row_end - 1);
    int token = packed / p.group, head = kv_head * p.group + packed % p.group;
    const Element* src = q + (first_token + token) * p.q_token + head * p.q_head + chunk * 8;
    copy_async_16(smem_q + LayoutQk::offset(row, chunk), src, true);
  }
}

}  // namespace fi::sm80
