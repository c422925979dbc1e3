// Body of the prefix finder on the GPU, apart from its launches so that a test can run it with host threads.
#pragma once
#include "../prefix.h"
#include "plan.cuh"

namespace fi::smxx {

template <int kThreads>
struct HashShared {
  int64_t sums[32];
};

// The hashes of one request, by the threads of a CTA.
template <int kThreads>
__device__ __forceinline__ void hash_request(const FindParams& p, int32_t request,
                                             HashShared<kThreads>& shared) {
  constexpr int kEach = 4;  // neighbouring entries of a thread
  static_assert(kThreads * kEach <= 1 << 14, "hashes and the sum so far fit a sum");
  const int32_t tiles = sharing_tiles(p, request);
  if (threadIdx.x == 0) p.tiles[request] = tiles;
  __syncthreads();
  const int32_t count = entries_for(p, tiles);
  const Entries entries = entries_of(p.batch, request);
  int64_t sum = 0;
#pragma unroll 1
  for (int32_t base = 0; base < count; base += kThreads * kEach) {
    const int32_t first = base + threadIdx.x * kEach;
    int64_t hashes[kEach], own = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      hashes[i] = first + i < count ? hash_of(first + i, entries[first + i]) : 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) own += hashes[i];
    const Scan scanned = scan<kThreads>(own, shared.sums);
    int64_t up_to = sum + scanned.before;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      up_to += hashes[i];
      if (first + i < count) note_hash(p, request, first + i, up_to & kHashMask);
    }
    sum = (sum + scanned.sum) & kHashMask;
  }
}

struct FindShared {
  int64_t sums[32];
  int32_t tiles, back, rest;
  int32_t last;
};

// Attaches one request.
template <int kThreads>
__device__ __forceinline__ void attach_request(const FindParams& p, int32_t request, FindShared& shared) {
  if (threadIdx.x == 0) shared.tiles = shared.back = shared.rest = 0;
  __syncthreads();
  int32_t most = 0, back = 0;
  for (int32_t s = threadIdx.x; s < request; s += kThreads) {
    int32_t tiles = common_tiles(p, request, s);
    if (tiles > most) most = tiles, back = request - s;
  }
  raise(&shared.tiles, most);
  __syncthreads();
  const int32_t tiles = shared.tiles;
  raise(&shared.back, most == tiles ? back : 0);
  __syncthreads();
  const int32_t to = request - shared.back, count = entries_for(p, tiles);
  const Entries a = entries_of(p.batch, request), b = entries_of(p.batch, to);
  int32_t rest = 0;  // entries from the first that differs
  for (int32_t i = threadIdx.x; i < count && rest == 0; i += kThreads)
    if (a[i] != b[i]) rest = count - i;
  raise(&shared.rest, rest);
  __syncthreads();
  if (threadIdx.x == 0) p.attached[request] = attachment(p, to, tiles, count - shared.rest);
}

template <int kThreads>
struct Cta {
  static constexpr int32_t size = kThreads;
  int32_t rank;
  int64_t* sums;  // [32]

  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ void fence() const { __threadfence_block(); }
  __device__ __forceinline__ int32_t add(int32_t* to, int32_t x) const { return atomicAdd(to, x); }
  __device__ __forceinline__ int64_t add(int64_t* to, int64_t x) const {
    return atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(x));
  }
  __device__ __forceinline__ int32_t scan(int32_t* values, int32_t count) const {
    __syncthreads();
    int64_t sum = 0;
#pragma unroll 1
    for (int32_t base = 0; base < count; base += kThreads) {
      const int32_t i = base + rank;
      const Scan scanned = smxx::scan<kThreads>(i < count ? values[i] : 0, sums);
      if (i < count) values[i] = int32_t(sum + scanned.before);
      sum += scanned.sum;
    }
    __syncthreads();
    return int32_t(sum);
  }
  // Bitonic. count: a power of 2
  __device__ __forceinline__ void sort(SortKey* keys, int32_t count) const {
    for (int32_t run = 2; run <= count; run *= 2) {
      for (int32_t apart = run / 2; apart > 0; apart /= 2) {
        __syncthreads();
#pragma unroll 1
        for (int32_t i = rank; i < count / 2; i += kThreads) {
          const int32_t low = 2 * i - (i & (apart - 1)), high = low + apart;
          const SortKey a = keys[low], b = keys[high];
          if ((a.bits > b.bits) == ((low & run) == 0)) {
            keys[low] = b;
            keys[high] = a;
          }
        }
      }
    }
    __syncthreads();
  }
};

// Attaches one request; the CTA that is the last to do so builds the tree. memory: Trie::bytes(requests)
template <int kThreads>
__device__ __forceinline__ void find_prefixes(const FindParams& p, int32_t request, FindShared& shared,
                                              void* memory) {
  const int32_t n = p.batch.num_requests;
  if (n > 0) {
    attach_request<kThreads>(p, request, shared);
    if (threadIdx.x == 0) {
      __threadfence();
      shared.last = atomicAdd(&p.totals->attached, 1) == n - 1;
      __threadfence();
    }
    __syncthreads();
    if (!shared.last) return;
  }
  build_tree(p, Trie(memory, n), Cta<kThreads>{int32_t(threadIdx.x), shared.sums});
}

}  // namespace fi::smxx
