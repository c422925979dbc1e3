// What Python's Planner calls. A configuration travels as one Shape: the fields of PlanConfig in order.
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include <cstring>

#include "config.h"
#include "cost.h"
#include "plan.h"
#include "schedule.h"
#include "tiles.h"

namespace fi::core {
namespace {

PlanConfig config_of(const Shape& numbers) {
  return struct_of<PlanConfig>(numbers, "a planner configuration");
}

PlanParams params_of(const PlanConfig& config, const PlanLayout& layout, const TensorView& buffer,
                     const TensorView& qo_indptr, const TensorView& kv_len) {
  FI_REQUIRE(buffer.IsContiguous() && buffer.numel() * element_bytes(buffer) >= layout.bytes, ValueError)
      << "expected a contiguous plan buffer of " << layout.bytes << " bytes, got "
      << buffer.numel() * element_bytes(buffer);
  FI_REQUIRE(reinterpret_cast<uintptr_t>(data_of(buffer)) % 64 == 0, ValueError)
      << "expected the plan buffer aligned to 64 bytes, got an address that is "
      << reinterpret_cast<uintptr_t>(data_of(buffer)) % 64 << " bytes past";
  int32_t requests = require_lengths(qo_indptr, kv_len, buffer, config.max_requests);
  return plan_params(config, layout, data_of(buffer), reinterpret_cast<const int32_t*>(data_of(qo_indptr)),
                     reinterpret_cast<const int32_t*>(data_of(kv_len)), requests);
}

Shape layout_of(const Shape& numbers) {
  PlanConfig config = config_of(numbers);
  return numbers_of(as_value_error([&] { return plan_layout(config); }));
}

// Returns the bytes of the buffer up to its last item: all that a device needs.
int64_t plan_on_host(const Shape& numbers, TensorView buffer, TensorView qo_indptr, TensorView kv_len) {
  FI_REQUIRE(on_host(buffer), ValueError)
      << "expected the host planner's buffer on the CPU, got " << device_text(buffer.device());
  PlanConfig config = config_of(numbers);
  PlanLayout layout = as_value_error([&] { return plan_layout(config); });
  PlanParams p = params_of(config, layout, buffer, qo_indptr, kv_len);
  as_value_error([&] { return check_lengths(config, p.qo_indptr, p.kv_len, p.num_requests); });
  plan_host(p);
  return layout.items + int64_t(p.header->items) * int64_t(sizeof(WorkItem));
}

// function, error_text: addresses of fi_plan and fi_error in the smxx library. Lengths are not checked: they
// are the device's; a plan that does not fit is empty and says so in its header.
void plan_on_device(const Shape& numbers, TensorView buffer, TensorView qo_indptr, TensorView kv_len,
                    int64_t function, int64_t error_text) {
  PlanConfig config = config_of(numbers);
  PlanLayout layout = as_value_error([&] { return plan_layout(config); });
  PlanParams p = params_of(config, layout, buffer, qo_indptr, kv_len);
  call_library(function, error_text, p, buffer.device(), "planner");
}

// Fills the plan buffer's TileList, which the planner then reads. function, error_text: addresses in a tile
// lister for the buffer's device. It leaves out lengths beyond the capacities, which the planner finds.
void list_tiles(const Shape& numbers, TensorView buffer, TensorView qo_indptr, TensorView kv_len,
                int64_t function, int64_t error_text, tvm::ffi::Bytes variant_args) {
  PlanConfig config = config_of(numbers);
  PlanLayout layout = as_value_error([&] { return plan_layout(config); });
  ListParams p{params_of(config, layout, buffer, qo_indptr, kv_len), {}};
  FI_REQUIRE(variant_args.size() <= kMaxVariantBytes, ValueError)
      << "expected at most " << kMaxVariantBytes << " bytes of variant arguments, got "
      << variant_args.size();
  std::memcpy(p.variant_args, variant_args.data(), variant_args.size());
  call_library(function, error_text, p, buffer.device(), "tile lister");
}

Shape tiles_of(int64_t room, int64_t arch, int64_t head_dim_qk, int64_t head_dim_vo) {
  Tiles t = tiles_for(int(room), int(arch), int(head_dim_qk), int(head_dim_vo));
  return {t.q_wide, t.q_narrow, t.kv, t.ctas_per_sm, kMaxWorkers};
}

Shape cost_model(int64_t room) {
  Costs c = costs_for(int32_t(room));
  return {c.narrow_item, c.narrow,  c.wide_item,   c.wide,       c.prefix,
          kMinTiles,     kMinSlice, uncut_cost(c), kSpreadSlack, kChunkTiles};
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan_tiles, tiles_of);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan_cost_model, cost_model);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan_layout, layout_of);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan_host, plan_on_host);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan_device, plan_on_device);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(list_tiles, list_tiles);

}  // namespace fi::core
