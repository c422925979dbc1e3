#include <cstring>

#include "attention.h"

namespace fi::core {
namespace {

void check_new(const char* name, const TensorView& x, const TensorView& cache, int64_t tokens, bool gpu) {
  require_device(name, x, cache.device());
  require_dtype(name, x, cache.dtype());
  FI_REQUIRE(x.ndim() == 3 && x.size(0) >= tokens && x.size(1) == cache.size(2) && x.size(2) == cache.size(3),
             ValueError)
      << "expected " << name << " of shape [" << tokens << " or more, " << cache.size(2) << ", "
      << cache.size(3) << "], got " << shape_text(x);
  require_rows(name, x, gpu);
  require_rows("cache", cache, gpu);
  FI_REQUIRE(!gpu || x.size(2) * element_bytes(x) % 16 == 0, ValueError)
      << "expected " << name << " with rows of a multiple of 16 bytes, got " << x.size(2) << " elements of "
      << element_bytes(x) << " bytes";
}

// One side of the cache, K or V.
void scatter(const void* from, int64_t from_token, int64_t from_head, void* to, int64_t to_page,
             int64_t to_token, int64_t to_head, int64_t row_bytes, const AppendParams& p) {
  for (int32_t i = 0; i < p.tokens; ++i) {
    int64_t slot = p.slot_mapping[i];
    if (slot < 0) continue;
    int64_t page = slot / p.kv.page_size, offset = slot % p.kv.page_size;
    for (int32_t h = 0; h < p.kv_heads; ++h) {
      const char* source =
          static_cast<const char*>(from) + (i * from_token + h * from_head) * p.element_bytes;
      int64_t target = page * to_page + offset * to_token + h * to_head;
      std::memcpy(static_cast<char*>(to) + target * p.element_bytes, source, size_t(row_bytes));
    }
  }
}

void append_cpu(const AppendParams& p) {
  int64_t slots = int64_t(p.kv.num_pages) * p.kv.page_size;
  for (int32_t i = 0; i < p.tokens; ++i) {  // before the first write: nothing is half done
    FI_REQUIRE(p.slot_mapping[i] < slots, ValueError)
        << "expected slots below " << slots << " (pages x page_size), got " << p.slot_mapping[i]
        << " for token " << i;
  }
  scatter(p.k, p.k_token, p.k_head, p.kv.k, p.kv.k_page, p.kv.k_token, p.kv.k_head, p.bytes_qk, p);
  scatter(p.v, p.v_token, p.v_head, p.kv.v, p.kv.v_page, p.kv.v_token, p.kv.v_head, p.bytes_vo, p);
}

}  // namespace

void append(int64_t function, int64_t error_text, const TensorView& k_cache, const TensorView& v_cache,
            const TensorView& k, const TensorView& v, const TensorView& slot_mapping) {
  DLDevice device = k_cache.device();
  bool gpu = device.device_type != kDLCPU;
  require_device("slot_mapping", slot_mapping, device);
  require_dtype("slot_mapping", slot_mapping, DLDataType{kDLInt, 64, 1});
  require_rank("slot_mapping", slot_mapping, 1, "[tokens]");
  require_rows("slot_mapping", slot_mapping, false);
  int64_t tokens = slot_mapping.size(0);
  FI_REQUIRE(tokens <= INT32_MAX, ValueError) << "expected at most 2147483647 tokens, got " << tokens;
  check_new("k", k, k_cache, tokens, gpu);
  check_new("v", v, v_cache, tokens, gpu);
  if (tokens == 0) return;

  AppendParams p{};
  p.k = data_of(k);
  p.v = data_of(v);
  p.k_token = k.stride(0), p.k_head = k.stride(1);
  p.v_token = v.stride(0), p.v_head = v.stride(1);
  p.kv = cache_view(k_cache, v_cache);
  p.slot_mapping = reinterpret_cast<const int64_t*>(data_of(slot_mapping));
  p.tokens = int32_t(tokens);
  p.kv_heads = int32_t(k_cache.size(2));
  p.element_bytes = element_bytes(k);
  p.bytes_qk = int32_t(k.size(2)) * p.element_bytes;
  p.bytes_vo = int32_t(v.size(2)) * p.element_bytes;
  if (gpu) {
    call_library(function, error_text, p, device, "append");
  } else {
    append_cpu(p);
  }
}

}  // namespace fi::core
