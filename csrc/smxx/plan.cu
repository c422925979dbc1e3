// The planner on the GPU: one CTA, no host synchronisation, the bytes of csrc/core/plan.cpp.
//
// Lengths -> segments of one KV head and their cost line -> cuts between workers -> items and merges. Each
// phase ends at a barrier; within a phase threads are independent but for block-wide scans.
#include "plan.cuh"

#include <cuda_runtime.h>

namespace fi::smxx {

constexpr int kPlanThreads = 1024;

enum class Kind { kSimple, kChunked, kListed, kLevels };

template <Kind kKind>
__global__ void __launch_bounds__(kPlanThreads) plan_kernel(const __grid_constant__ PlanParams params) {
  __shared__ PlanShared<kPlanThreads> shared;
  PlanParams p = params;  // a copy, of which the compiler knows the kind: what is not for it is left out
  p.chunk_tiles = kKind == Kind::kChunked ? kChunkTiles : 0;
  if (kKind != Kind::kListed) p.list = {};
  if (kKind != Kind::kLevels) p.levels = {};
  plan_block<kPlanThreads>(p, shared);
}

}  // namespace fi::smxx

extern "C" int fi_plan(const fi::PlanParams* params, void* stream) {
  using namespace fi::smxx;
  auto kernel = params->chunk_tiles > 0      ? plan_kernel<Kind::kChunked>
                : params->list.counts        ? plan_kernel<Kind::kListed>
                : params->levels.tree.header ? plan_kernel<Kind::kLevels>
                                             : plan_kernel<Kind::kSimple>;
  kernel<<<1, kPlanThreads, 0, static_cast<cudaStream_t>(stream)>>>(*params);
  return cudaGetLastError();
}

extern "C" const char* fi_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
