// What Python's PrefixFinder calls.
#include <tvm/ffi/function.h>

#include <utility>
#include <vector>

#include "config.h"
#include "prefix.h"

namespace fi::core {
namespace {

Shape layout_of(const Shape& numbers) {
  auto config = struct_of<PrefixConfig>(numbers, "a prefix finder's configuration");
  return numbers_of(as_value_error([&] { return prefix_layout(config); }));
}

// A finder's parameters without a page table. Lengths lie where the buffer does.
FindParams params_of(const PrefixConfig& config, const TensorView& buffer, const TensorView& qo_indptr,
                     const TensorView& kv_len) {
  PrefixLayout layout = as_value_error([&] { return prefix_layout(config); });
  int32_t requests = require_lengths(qo_indptr, kv_len, buffer, config.max_requests);
  FindParams p = find_params(config, layout, data_of(buffer));
  p.batch.qo_indptr = reinterpret_cast<const int32_t*>(data_of(qo_indptr));
  p.batch.kv_len = reinterpret_cast<const int32_t*>(data_of(kv_len));
  p.batch.num_requests = requests;
  return p;
}

// function, error_text: addresses of fi_find_prefixes and fi_error in the smxx library; 0 on the CPU.
void find_prefixes(const Shape& numbers, TensorView buffer, TensorView qo_indptr, TensorView kv_len,
                   TensorView table, Optional<TensorView> starts, int64_t start_stride, int64_t entry_step,
                   int64_t page_size, int64_t function, int64_t error_text) {
  auto config = struct_of<PrefixConfig>(numbers, "a prefix finder's configuration");
  FindParams p = params_of(config, buffer, qo_indptr, kv_len);
  require_device("page table", table, buffer.device());
  require_dtype("page table", table, DLDataType{kDLInt, 32, 1});
  FI_REQUIRE(entry_step >= 0 && entry_step <= INT32_MAX, ValueError)
      << "expected a page table step of 0 to 2147483647 entries, got " << entry_step;
  FI_REQUIRE(page_size >= 1 && page_size <= kMaxKvLen, ValueError)
      << "expected page_size from 1 to " << kMaxKvLen << ", got " << page_size;
  p.page_size = int32_t(page_size);
  p.batch.table = reinterpret_cast<const int32_t*>(data_of(table));
  p.batch.starts = starts.has_value() ? data_of(*starts) : nullptr;
  p.batch.starts_are_64 = starts.has_value() && (*starts).dtype().bits == 64;
  p.batch.start_stride = start_stride;
  p.batch.entry_step = int32_t(entry_step);
  if (function == 0) {
    find_prefixes_host(p);
  } else {
    call_library(function, error_text, p, buffer.device(), "prefix finder");
  }
}

// Prefix i is keys[i] keys for requests[ends[i - 1]] up to requests[ends[i] - 1].
void set_tree(const Shape& numbers, TensorView buffer, TensorView qo_indptr, TensorView kv_len,
              const Shape& keys, const Shape& ends, const Shape& requests) {
  FI_REQUIRE(on_host(buffer), ValueError)
      << "expected the buffer on the CPU, got " << device_text(buffer.device());
  auto config = struct_of<PrefixConfig>(numbers, "a prefix finder's configuration");
  FindParams p = params_of(config, buffer, qo_indptr, kv_len);
  std::vector<GivenPrefix> given;
  for (size_t i = 0; i < keys.size(); ++i) {
    const int64_t* first = requests.begin() + (i > 0 ? ends[i - 1] : 0);
    given.push_back({keys[i], {first, requests.begin() + ends[i]}});
  }
  as_value_error([&] { return set_prefixes(config, p, std::move(given)); });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(prefix_layout, layout_of);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(find_prefixes, find_prefixes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_prefixes, set_tree);

}  // namespace fi::core
