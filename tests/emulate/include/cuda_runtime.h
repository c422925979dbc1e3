// What of CUDA's runtime API the doors use, for the emulator: a launch runs the kernel, block by block.
#pragma once
#include <string>

#include "../cuda_on_host.h"
#include "cuda.h"

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorNotSupported, cudaErrorLaunchFailure };
typedef void* cudaStream_t;
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
constexpr int cudaEnableDefault = 0;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  int gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  int numAttrs;
};

namespace emulate {
inline unsigned seed = 0;
inline std::string failure;
}  // namespace emulate

inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** found, unsigned, int,
                                                    cudaDriverEntryPointQueryResult*) {
  *found = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return emulate::failure.c_str(); }

template <class P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P), const P& params) {
  gridDim.x = config->gridDim, blockDim.x = config->blockDim;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    try {
      emulate::block.run(config->blockDim, emulate::seed * 1000 + blockIdx.x, [&] { kernel(params); });
    } catch (const std::exception& error) {
      emulate::failure = error.what();
      return cudaErrorLaunchFailure;
    }
  }
  return cudaSuccess;
}
