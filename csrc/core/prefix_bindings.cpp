// What Python's PrefixFinder calls.
#include <tvm/ffi/function.h>

#include "config.h"
#include "prefix.h"

namespace fi::core {
namespace {

constexpr DLDataType kInt32{kDLInt, 32, 1};

Shape layout_of(const Shape& numbers) {
  auto config = struct_of<PrefixConfig>(numbers, "a prefix finder's configuration");
  return numbers_of(as_value_error([&] { return prefix_layout(config); }));
}

void require_lengths(const char* name, const TensorView& x, DLDevice device) {
  require_device(name, x, device);
  require_dtype(name, x, kInt32);
  require_rank(name, x, 1, "[requests]");
  FI_REQUIRE(x.IsContiguous(), ValueError) << "expected " << name << " contiguous";
}

// function, error_text: addresses of fi_find_prefixes and fi_error in the smxx library; 0 on the CPU.
void find_prefixes(const Shape& numbers, TensorView buffer, TensorView qo_indptr, TensorView kv_len,
                   TensorView table, Optional<TensorView> starts, int64_t start_stride, int64_t entry_step,
                   int64_t page_size, int64_t function, int64_t error_text) {
  auto config = struct_of<PrefixConfig>(numbers, "a prefix finder's configuration");
  PrefixLayout layout = as_value_error([&] { return prefix_layout(config); });
  FI_REQUIRE(buffer.IsContiguous() && buffer.numel() * element_bytes(buffer) >= layout.bytes, ValueError)
      << "expected a contiguous buffer of " << layout.bytes << " bytes, got "
      << buffer.numel() * element_bytes(buffer);
  require_lengths("qo_indptr", qo_indptr, buffer.device());
  require_lengths("kv_len", kv_len, buffer.device());
  require_device("page table", table, buffer.device());
  require_dtype("page table", table, kInt32);
  int64_t requests = kv_len.size(0);
  FI_REQUIRE(qo_indptr.size(0) == requests + 1, ValueError)
      << "expected qo_indptr of " << requests + 1 << " entries (kv_len has " << requests << "), got "
      << qo_indptr.size(0);
  FI_REQUIRE(requests <= config.max_requests, ValueError)
      << "expected at most " << config.max_requests << " requests (max_requests), got " << requests;
  FI_REQUIRE(entry_step >= 0 && entry_step <= INT32_MAX, ValueError)
      << "expected a page table step of 0 to 2147483647 entries, got " << entry_step;
  FI_REQUIRE(page_size >= 1 && page_size <= kMaxKvLen, ValueError)
      << "expected page_size from 1 to " << kMaxKvLen << ", got " << page_size;

  Batch batch{};
  batch.qo_indptr = reinterpret_cast<const int32_t*>(data_of(qo_indptr));
  batch.kv_len = reinterpret_cast<const int32_t*>(data_of(kv_len));
  batch.table = reinterpret_cast<const int32_t*>(data_of(table));
  batch.starts = starts.has_value() ? data_of(*starts) : nullptr;
  batch.starts_are_64 = starts.has_value() && (*starts).dtype().bits == 64;
  batch.start_stride = start_stride;
  batch.entry_step = int32_t(entry_step);
  batch.num_requests = int32_t(requests);
  FindParams p = find_params(config, layout, data_of(buffer), batch, int32_t(page_size));
  if (function == 0) {
    find_prefixes_host(p);
  } else {
    call_library(function, error_text, p, buffer.device(), "prefix finder");
  }
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(prefix_layout, layout_of);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(find_prefixes, find_prefixes);

}  // namespace fi::core
