// The tile lister on the GPU, for the variant in fi_spec.h: a CTA for each line that the list has room for,
// so that the launch depends on capacities alone.
#include "tile_list.cuh"

#include <cuda_runtime.h>

namespace fi::smxx {

constexpr int kListThreads = 256;

__global__ void __launch_bounds__(kListThreads) list_kernel(const __grid_constant__ ListParams params) {
  __shared__ ListShared<kListThreads> shared;
  const auto& args = *reinterpret_cast<const spec::Args*>(params.variant_args);
  list_row_tile<spec::Variant>(params.plan, args, blockIdx.x, shared);
}

}  // namespace fi::smxx

extern "C" int fi_tile_list(const fi::ListParams* params, void* stream) {
  using namespace fi::smxx;
  list_kernel<<<params->plan.list.lines, kListThreads, 0, static_cast<cudaStream_t>(stream)>>>(*params);
  return cudaGetLastError();
}

extern "C" const char* fi_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
