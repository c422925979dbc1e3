// Door of the sm90 room: tensor maps of the cache, then the persistent kernel and the merge.
#include "../smxx/merge_places.cuh"
#include "attention.cuh"

#include <cuda_runtime.h>

namespace fi::sm90 {

int32_t page_shift_of(int32_t page_size) {
  int32_t shift = 0;
  while (1 << shift < page_size) ++shift;
  return 1 << shift == page_size ? shift : -1;
}

// A kernel that may be launched while the one before it in the stream still runs, if that one lets it: the
// launch itself then costs nothing. It waits by wait_for_kernel_before().
template <class P>
cudaError_t launch_early(void (*kernel)(P), const P& params, int blocks, int threads, int smem,
                         cudaStream_t stream) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = smem;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

__global__ void __launch_bounds__(32 * kMergeWarps, kMergeResidents)
    merge_after_items(const __grid_constant__ AttentionParams p) {
  if constexpr (kLevels) merge_places(p, wait_for_kernel_before);
  merge_rows(p, wait_for_kernel_before);
}

// Tokens of a box, or 0. Boxes are whole groups of eight swizzled lines and lie within a page and a tile.
int32_t box_tokens_for(const KVCache& kv, int32_t page_shift) {
  if (page_shift < 3 || kv.num_pages == 0) return 0;  // a tensor map has no empty dimension
  constexpr int32_t kMost = kTileKv & -kTileKv;       // the largest power of two that divides it
  return kv.page_size < kMost ? kv.page_size : kMost;
}

// The driver's function, without linking the driver.
decltype(&cuTensorMapEncodeTiled) map_encoder() {
  static void* found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                         &result) != cudaSuccess)
      return static_cast<void*>(nullptr);
    return function;
  }();
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

struct Axis {
  int64_t size, stride;  // elements
  int32_t box;
};

// The rows of a box, a line of each. L2 fetches at once no more than what a row fills: the rest belongs to
// others.
cudaError_t make_map(CUtensorMap* map, void* base, int head_dim, Axis y, Axis z, Axis w) {
  auto encode = map_encoder();
  if (!encode) return cudaErrorNotSupported;
  constexpr bool kBf16 = sizeof(Element) == 2 && !std::is_same_v<Element, __half>;
  auto type = kBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  cuuint64_t sizes[4] = {cuuint64_t(head_dim), cuuint64_t(y.size), cuuint64_t(z.size), cuuint64_t(w.size)};
  auto bytes = [](const Axis& a) { return a.size == 1 ? 16 : cuuint64_t(a.stride) * 2; };
  cuuint64_t strides[3] = {bytes(y), bytes(z), bytes(w)};
  cuuint32_t box[4] = {kLine, cuuint32_t(y.box), cuuint32_t(z.box), cuuint32_t(w.box)},
             steps[4] = {1, 1, 1, 1};
  CUresult result = encode(map, type, 4, base, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                           kLineBytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                           head_dim % 128 == 0  ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B
                           : head_dim % 64 == 0 ? CU_TENSOR_MAP_L2_PROMOTION_L2_128B
                                                : CU_TENSOR_MAP_L2_PROMOTION_NONE,
                           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

struct Tokens {
  void* base;
  int head_dim;
  int64_t page, token, head;
};

Steps steps_of(int64_t page, int64_t token) { return {uint32_t(page / 8), uint32_t(token / 8)}; }

// Whether tokens lie at equal distances all through K, or V, so that a box can hold tokens of many pages.
bool is_flat(const KVCache& kv, const Tokens& t) {
  return kv.page_size == 1 || t.page == kv.page_size * t.token;
}

cudaError_t map_cache(Params& params) {
  const AttentionParams& p = params.attention;
  const KVCache& kv = p.kv;
  Tokens k{kv.k, kDimQk, kv.k_page, kv.k_token, kv.k_head}, v{kv.v, kDimVo, kv.v_page, kv.v_token, kv.v_head};
  if (params.box_tokens > 0) {
    auto pages = [&](CUtensorMap* map, const Tokens& t) {
      return make_map(map, t.base, t.head_dim, {kv.page_size, t.token, params.box_tokens},
                      {p.kv_heads, t.head, 1}, {kv.num_pages, t.page, 1});
    };
    cudaError_t error = pages(&params.k, k);
    return error == cudaSuccess ? pages(&params.v, v) : error;
  }
  int64_t tokens = int64_t(kv.num_pages) * kv.page_size;
  if (tokens == 0 || tokens > INT32_MAX || !is_flat(kv, k) || !is_flat(kv, v)) return cudaSuccess;
  auto flat = [&](CUtensorMap* map, const Tokens& t) {
    return make_map(map, t.base, t.head_dim, {tokens, kv.page_size == 1 ? t.page : t.token, kRunTokens},
                    {p.kv_heads, t.head, 1}, {1, 0, 1}) == cudaSuccess;
  };
  params.runs = flat(&params.k, k) && flat(&params.v, v);  // strides it does not take: all is gathered
  return cudaSuccess;
}

}  // namespace fi::sm90

extern "C" int fi_attention(const fi::AttentionParams* attention, void* stream_handle) {
  using namespace fi::sm90;
  auto stream = static_cast<cudaStream_t>(stream_handle);
  Params params{};
  params.attention = *attention;
  params.page_shift = page_shift_of(attention->kv.page_size);
  params.box_tokens = box_tokens_for(attention->kv, params.page_shift);
  params.k_steps = steps_of(attention->kv.k_page, attention->kv.k_token);
  params.v_steps = steps_of(attention->kv.v_page, attention->kv.v_token);
  cudaError_t error = map_cache(params);
  if (error != cudaSuccess) return error;
  if (kTileQ % attention->group == 0) {
    int heads = attention->kv_heads * attention->group;
    error = make_map(&params.q, const_cast<void*>(attention->q), kDimQk,
                     {heads, attention->q_head, attention->group},
                     {attention->tokens, attention->q_token, kTileQ / attention->group}, {1, 0, 1});
    params.q_boxes = error == cudaSuccess;  // strides it does not take: copied row by row
    if (kLevels && params.q_boxes && attention->group * kLineBytes % 128 == 0) {  // where boxes may begin
      error = make_map(&params.q_token, const_cast<void*>(attention->q), kDimQk,
                       {heads, attention->q_head, attention->group},
                       {attention->tokens, attention->q_token, 1}, {1, 0, 1});
      params.token_boxes = error == cudaSuccess;
    }
  }
  // Per call, not once: the attribute belongs to the current device.
  error = cudaFuncSetAttribute(attention_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes);
  if (error != cudaSuccess) return error;
  error = launch_early(attention_kernel, params, attention->workers, kThreads, kSmemBytes, stream);
  if (error != cudaSuccess) return error;
  return launch_early(merge_after_items, *attention, attention->workers, 32 * kMergeWarps, 0, stream);
}

extern "C" const char* fi_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
