// KV append: every new token's K and V rows to their slots, 16 bytes a thread. Negative slots are skipped.
#include "../params.h"

#include <cuda_runtime.h>

namespace fi::smxx {

constexpr int kAppendThreads = 128;

__device__ __forceinline__ void copy_heads(const char* src, int64_t src_head, char* dst, int64_t dst_head,
                                           int heads, int row_bytes) {
  int chunks = row_bytes / 16;
  for (int i = threadIdx.x; i < heads * chunks; i += kAppendThreads) {
    int head = i / chunks, byte = i % chunks * 16;
    *reinterpret_cast<int4*>(dst + head * dst_head + byte) =
        *reinterpret_cast<const int4*>(src + head * src_head + byte);
  }
}

// One block a token. Strides become bytes here.
__global__ void __launch_bounds__(kAppendThreads) append_kernel(const __grid_constant__ AppendParams p) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");  // attention may follow, and waits itself
#endif
  int64_t token = blockIdx.x;
  int64_t slot = p.slot_mapping[token];
  if (slot < 0) return;
  int64_t page = slot / p.kv.page_size, offset = slot - page * p.kv.page_size, e = p.element_bytes;
  copy_heads(static_cast<const char*>(p.k) + token * p.k_token * e, p.k_head * e,
             static_cast<char*>(p.kv.k) + (page * p.kv.k_page + offset * p.kv.k_token) * e, p.kv.k_head * e,
             p.kv_heads, p.bytes_qk);
  copy_heads(static_cast<const char*>(p.v) + token * p.v_token * e, p.v_head * e,
             static_cast<char*>(p.kv.v) + (page * p.kv.v_page + offset * p.kv.v_token) * e, p.kv.v_head * e,
             p.kv_heads, p.bytes_vo);
}

}  // namespace fi::smxx

extern "C" int fi_append(const fi::AppendParams* params, void* stream) {
  if (params->tokens == 0) return cudaSuccess;
  fi::smxx::append_kernel<<<params->tokens, fi::smxx::kAppendThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      *params);
  return cudaGetLastError();
}
