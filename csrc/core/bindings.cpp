// What Python calls. The planner's exports are in plan_bindings.cpp.
#include <tvm/ffi/function.h>

#include "attention.h"

namespace fi::core {
namespace {

// A bound plan lives in a uint8 CPU tensor that Python keeps beside the tensors it points into.
BoundPlan& bound_in(const TensorView& storage) {
  FI_REQUIRE(storage.device().device_type == kDLCPU && storage.IsContiguous() &&
                 storage.numel() * element_bytes(storage) >= int64_t(sizeof(BoundPlan)),
             ValueError)
      << "expected bound-plan storage of " << sizeof(BoundPlan) << " bytes on the CPU, got "
      << shape_text(storage);
  return *reinterpret_cast<BoundPlan*>(data_of(storage));
}

int64_t bound_bytes() { return sizeof(BoundPlan); }

void bind_plan(TensorView storage, TensorView qo_indptr, TensorView kv_len, TensorView table,
               Optional<TensorView> starts, int64_t start_stride, int64_t entry_step, bool entries_are_slots,
               int64_t page_size, TensorView header, TensorView worker_indptr, TensorView items,
               TensorView merges, TensorView partial_o, TensorView partial_lse,
               Optional<TensorView> partial_sum, int64_t partial_rows, int64_t worker_state, int64_t workers,
               int64_t kv_heads, int64_t group, int64_t head_dim_qk, int64_t head_dim_vo,
               Optional<TensorView> profile, Optional<TensorView> tile_list, int64_t levels, int64_t prefixes,
               int64_t places) {
  BatchArgs batch{qo_indptr, kv_len, table, starts, start_stride, entry_step, page_size, entries_are_slots};
  bind(bound_in(storage), batch, header, worker_indptr, items, merges, partial_o, partial_lse, partial_sum,
       partial_rows, worker_state, workers, kv_heads, group, head_dim_qk, head_dim_vo, profile, tile_list,
       levels, {nullptr, reinterpret_cast<Prefix*>(prefixes), nullptr, reinterpret_cast<Place*>(places)});
}

void run_plan(TensorView storage, int64_t function, int64_t error_text, TensorView q, TensorView k,
              TensorView v, TensorView out, Optional<TensorView> lse, double scale,
              tvm::ffi::Bytes variant_args) {
  run(bound_in(storage), function, error_text, q, k, v, out, lse, scale, variant_args.data(),
      variant_args.size());
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(bound_bytes, bound_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(bind, bind_plan);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(run, run_plan);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(append, append);

}  // namespace fi::core
