// Attention at the door: what a plan fixes is bound once, what changes from layer to layer is checked per
// call.
#pragma once
#include "door.h"
#include "params.h"

namespace fi::core {

struct BoundPlan {
  AttentionParams params;  // batch, plan buffers, heads; the rest is filled by each call
  DLDevice device;
  int32_t page_size;
  int32_t head_dim_qk, head_dim_vo;
};

struct BatchArgs {
  TensorView qo_indptr, kv_len, table;
  Optional<TensorView> starts;
  int64_t start_stride, entry_step, page_size;
  bool entries_are_slots;
};

void bind(BoundPlan& bound, const BatchArgs& batch, const TensorView& header, const TensorView& worker_indptr,
          const TensorView& items, const TensorView& merges, const TensorView& partial_o,
          const TensorView& partial_lse, const Optional<TensorView>& partial_sum, int64_t partial_rows,
          int64_t worker_state, int64_t workers, int64_t kv_heads, int64_t group, int64_t head_dim_qk,
          int64_t head_dim_vo, const Optional<TensorView>& profile, const Optional<TensorView>& tile_list,
          int64_t levels, const PrefixTree& tree);

void run(const BoundPlan& bound, int64_t function, int64_t error_text, const TensorView& q,
         const TensorView& k, const TensorView& v, const TensorView& out, const Optional<TensorView>& lse,
         double scale, const char* variant_args, size_t variant_bytes);

// function, error_text: addresses in the smxx library; 0 on the CPU, where this file appends by itself.
void append(int64_t function, int64_t error_text, const TensorView& k_cache, const TensorView& v_cache,
            const TensorView& k, const TensorView& v, const TensorView& slot_mapping);

KVCache cache_view(const TensorView& k, const TensorView& v);

}  // namespace fi::core
