// The prefix finder on the GPU: two launches of a CTA for each request, no host synchronisation, the tree of
// csrc/core/prefix.cpp.
#include "prefix.cuh"

#include <cuda_runtime.h>

namespace fi::smxx {

constexpr int kFindThreads = 512;

__global__ void __launch_bounds__(kFindThreads) hash_kernel(const __grid_constant__ FindParams p) {
  __shared__ HashShared<kFindThreads> shared;
  hash_request<kFindThreads>(p, blockIdx.x, shared);
}

__global__ void __launch_bounds__(kFindThreads) find_kernel(const __grid_constant__ FindParams p) {
  __shared__ FindShared shared;
  extern __shared__ __align__(8) unsigned char memory[];
  find_prefixes<kFindThreads>(p, blockIdx.x, shared, memory);
}

}  // namespace fi::smxx

extern "C" int fi_find_prefixes(const fi::FindParams* params, void* stream) {
  using namespace fi::smxx;
  auto on = static_cast<cudaStream_t>(stream);
  const int requests = params->batch.num_requests;
  if (requests > 1) hash_kernel<<<requests, kFindThreads, 0, on>>>(*params);
  const int bytes = int(fi::Trie::bytes(requests));
  if (bytes > 48 << 10) {
    auto code = cudaFuncSetAttribute(find_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (code != cudaSuccess) return code;
  }
  const int ctas = requests > 0 ? requests : 1;  // one says that an empty batch has no prefixes
  find_kernel<<<ctas, kFindThreads, bytes, on>>>(*params);
  return cudaGetLastError();
}
