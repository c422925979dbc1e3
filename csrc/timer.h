// Begin and end of every work item and merge, in profiling builds. In others it leaves no instruction behind.
#pragma once
#include <time.h>

#include "params.h"

namespace fi {

// Nanoseconds of one clock that all workers share.
FI_HD uint64_t now() {
#if defined(__CUDA_ARCH__)
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time)::"memory");  // "memory": stays where it is written
  return time;
#else
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return uint64_t(time.tv_sec) * 1000000000 + uint64_t(time.tv_nsec);
#endif
}

// n: an item's index, or header->items + a merge's. For one thread of a worker, the others at a barrier.
template <bool kProfile>
struct ItemTimer {
  FI_HD static void start(const AttentionParams& p, int32_t n) {
    if constexpr (kProfile) p.profile[2 * int64_t(n)] = now();
  }
  FI_HD static void stop(const AttentionParams& p, int32_t n) {
    if constexpr (kProfile) p.profile[2 * int64_t(n) + 1] = now();
  }
};

}  // namespace fi
