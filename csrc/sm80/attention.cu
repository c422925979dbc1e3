// Door of the sm80 room: launches the persistent kernel and the merge for the spec in fi_spec.h.
#include "../smxx/merge_places.cuh"
#include "attention.cuh"

#include <cuda_runtime.h>

namespace fi::sm80 {

__global__ void __launch_bounds__(32 * kMergeWarps, kMergeResidents)
    merge_after_items(const __grid_constant__ AttentionParams p) {
  if constexpr (kLevels) merge_places(p, [] {});
  merge_rows(p, [] {});
}

}  // namespace fi::sm80

extern "C" int fi_attention(const fi::AttentionParams* params, void* stream_handle) {
  using namespace fi::sm80;
  auto stream = static_cast<cudaStream_t>(stream_handle);
  // Per call, not once: the attribute belongs to the current device, and the call costs less than a lookup
  // would.
  cudaError_t error =
      cudaFuncSetAttribute(attention_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes);
  if (error != cudaSuccess) return error;
  attention_kernel<<<params->workers, kThreads, kSmemBytes, stream>>>(*params);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  merge_after_items<<<params->workers, 32 * kMergeWarps, 0, stream>>>(*params);
  return cudaGetLastError();
}

extern "C" const char* fi_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
