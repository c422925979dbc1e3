// Global -> shared: rows of Q, and KV tokens gathered through the page table.
#pragma once
#include "../smxx/task.cuh"
#include "traits.cuh"

namespace fi::sm80 {

// One K or V tile into a ring slot. base already points at the KV head.
template <class Layout>
__device__ __forceinline__ void load_tokens(int thread, uint32_t slot, const TokenPlace* places,
                                            const Element* base, int64_t page_stride, int64_t token_stride) {
  constexpr int kCopies = kTileKv * Layout::kChunks / kThreads;
  // Where a pass covers whole groups of eight rows, the swizzle is the same in every pass and all addresses
  // are one register plus a constant; the compiler does not find that by itself.
  constexpr bool kRegular = kThreads % (8 * Layout::kChunks) == 0;
  thread = forget(thread);
  int row0 = thread / Layout::kChunks, chunk0 = thread % Layout::kChunks;
  uint32_t slot0 = slot + Layout::offset(row0, chunk0);
#pragma unroll 8
  for (int i = 0; i < kCopies; ++i) {
    int index = thread + i * kThreads;
    int row = kRegular ? row0 + i * (kThreads / Layout::kChunks) : index / Layout::kChunks;
    int chunk = kRegular ? chunk0 : index % Layout::kChunks;
    uint32_t dst = kRegular ? slot0 + i * (kThreads / Layout::kChunks * Layout::kRowBytes)
                            : slot + Layout::offset(row, chunk);
    TokenPlace at = places[row];
    bool valid = at.page >= 0;
    const Element* src = valid ? base + at.page * page_stride + at.offset * token_stride + chunk * 8 : base;
    copy_async_16(dst, src, valid);
  }
}

// The tile's query rows; rows past the end repeat the last one, so they stay finite.
template <int kRows>
__device__ __forceinline__ void load_queries(int thread, uint32_t smem_q, const AttentionParams& p,
                                             const Task& task) {
  const Element* q = static_cast<const Element*>(p.q);
  int rows = kRows;
  if constexpr (kBatchInvariant) rows = min(rows, (task.end - task.begin + 15) / 16 * 16);  // those computed
  for (int index = thread; index < rows * LayoutQk::kChunks; index += kThreads) {
    int row = index / LayoutQk::kChunks, chunk = index % LayoutQk::kChunks;
    int packed = min(task.begin + row, task.end - 1);
    const Element* src =
        q + task.query_token(p, packed) * p.q_token + task.head_of(p, packed) * p.q_head + chunk * 8;
    copy_async_16(smem_q + LayoutQk::offset(row, chunk), src, true);
  }
}

}  // namespace fi::sm80
