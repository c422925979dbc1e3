#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace fi::core {
namespace {

constexpr DLDataType kFloat32{kDLFloat, 32, 1};

// sm90 counts 16 bytes in 32 bits.
void require_extent(const char* name, const TensorView& cache) {
  int64_t last = 0;
  for (int i = 0; i < 2; ++i) last += std::max<int64_t>(cache.size(i) - 1, 0) * cache.stride(i);
  int64_t bytes = last * element_bytes(cache);
  FI_REQUIRE(bytes < (int64_t(1) << 36) - 16, ValueError)
      << "expected " << name << " with less than 64 GiB from its first token to its last, got " << bytes
      << " bytes";
}

void check_cache(const BoundPlan& plan, const TensorView& q, const TensorView& k, const TensorView& v,
                 bool gpu) {
  require_device("k", k, plan.device);
  require_device("v", v, plan.device);
  require_dtype("k", k, q.dtype());
  require_dtype("v", v, q.dtype());
  require_rank("k", k, 4, "[pages, page_size, kv_heads, head_dim]");
  require_rank("v", v, 4, "[pages, page_size, kv_heads, head_dim_vo]");
  FI_REQUIRE(k.size(3) == plan.head_dim_qk, ValueError)
      << "expected head_dim " << plan.head_dim_qk << " in k, got " << k.size(3);
  FI_REQUIRE(v.size(3) == plan.head_dim_vo, ValueError)
      << "expected head_dim " << plan.head_dim_vo << " in v, got " << v.size(3);
  FI_REQUIRE(k.size(2) == plan.params.kv_heads, ValueError)
      << "expected " << plan.params.kv_heads << " kv heads, got " << k.size(2);
  FI_REQUIRE(k.size(1) == plan.page_size, ValueError)
      << "expected page_size " << plan.page_size << " (the batch's), got a cache of " << k.size(1);
  for (int i = 0; i < 3; ++i) {
    FI_REQUIRE(k.size(i) == v.size(i), ValueError)
        << "expected k and v of the same pages, page_size and kv_heads, got " << shape_text(k) << " and "
        << shape_text(v);
  }
  FI_REQUIRE(k.size(0) <= INT32_MAX, ValueError) << "expected at most 2147483647 pages, got " << k.size(0);
  require_rows("k", k, gpu);
  require_rows("v", v, gpu);
  if (gpu) {
    require_extent("k", k);
    require_extent("v", v);
  }
}

void check_rows(const BoundPlan& plan, const TensorView& q, const TensorView& out,
                const Optional<TensorView>& lse, bool gpu) {
  int64_t q_heads = int64_t(plan.params.kv_heads) * plan.params.group;
  require_device("q", q, plan.device);
  require_device("out", out, plan.device);
  require_rank("q", q, 3, "[tokens, q_heads, head_dim]");
  require_rank("out", out, 3, "[tokens, q_heads, head_dim_vo]");
  require_dtype("out", out, q.dtype());
  FI_REQUIRE(q.size(2) == plan.head_dim_qk, ValueError)
      << "expected head_dim " << plan.head_dim_qk << " in q, got " << q.size(2);
  FI_REQUIRE(q.size(1) == q_heads, ValueError)
      << "expected " << q_heads << " q heads (" << plan.params.kv_heads << " kv heads x group "
      << plan.params.group << "), got " << q.size(1);
  FI_REQUIRE(out.size(0) == q.size(0) && out.size(1) == q_heads && out.size(2) == plan.head_dim_vo,
             ValueError)
      << "expected out of shape [" << q.size(0) << ", " << q_heads << ", " << plan.head_dim_vo << "], got "
      << shape_text(out);
  require_rows("q", q, gpu);
  require_rows("out", out, gpu);
  if (!lse.has_value()) return;
  const TensorView& l = *lse;
  require_device("lse", l, plan.device);
  require_dtype("lse", l, kFloat32);
  FI_REQUIRE(l.ndim() == 2 && l.size(0) == q.size(0) && l.size(1) == q_heads && l.IsContiguous(), ValueError)
      << "expected lse contiguous of shape [" << q.size(0) << ", " << q_heads << "], got " << shape_text(l);
}

}  // namespace

KVCache cache_view(const TensorView& k, const TensorView& v) {
  KVCache kv;
  kv.k = data_of(k);
  kv.v = data_of(v);
  kv.k_page = k.stride(0), kv.k_token = k.stride(1), kv.k_head = k.stride(2);
  kv.v_page = v.stride(0), kv.v_token = v.stride(1), kv.v_head = v.stride(2);
  kv.page_size = int32_t(k.size(1));
  kv.num_pages = int32_t(k.size(0));
  return kv;
}

void bind(BoundPlan& bound, const BatchArgs& batch, const TensorView& header, const TensorView& worker_indptr,
          const TensorView& items, const TensorView& merges, const TensorView& partial_o,
          const TensorView& partial_lse, const Optional<TensorView>& partial_sum, int64_t partial_rows,
          int64_t worker_state, int64_t workers, int64_t kv_heads, int64_t group, int64_t head_dim_qk,
          int64_t head_dim_vo, const Optional<TensorView>& profile, const Optional<TensorView>& tile_list,
          int64_t levels, const PrefixTree& tree) {
  bound = BoundPlan{};
  bound.device = header.device();
  bound.page_size = int32_t(batch.page_size);
  bound.head_dim_qk = int32_t(head_dim_qk);
  bound.head_dim_vo = int32_t(head_dim_vo);
  require_device("page table", batch.table, bound.device);

  Batch& b = bound.params.batch;
  b.qo_indptr = reinterpret_cast<const int32_t*>(data_of(batch.qo_indptr));
  b.kv_len = reinterpret_cast<const int32_t*>(data_of(batch.kv_len));
  b.table = reinterpret_cast<const int32_t*>(data_of(batch.table));
  b.starts = batch.starts.has_value() ? data_of(*batch.starts) : nullptr;
  b.starts_are_64 = batch.starts.has_value() && (*batch.starts).dtype().bits == 64;
  b.start_stride = batch.start_stride;
  FI_REQUIRE(batch.entry_step >= 0 && batch.entry_step <= INT32_MAX, ValueError)
      << "expected a page table step of 0 to 2147483647 entries, got " << batch.entry_step;
  b.entry_step = int32_t(batch.entry_step);
  FI_REQUIRE(batch.page_size <= INT32_MAX, ValueError)
      << "expected page_size of at most 2147483647, got " << batch.page_size;
  b.entries_are_slots = batch.entries_are_slots;
  b.num_requests = int32_t(batch.kv_len.size(0));

  bound.params.header = reinterpret_cast<const PlanHeader*>(data_of(header));
  bound.params.worker_indptr = reinterpret_cast<const int32_t*>(data_of(worker_indptr));
  bound.params.items = reinterpret_cast<const WorkItem*>(data_of(items));
  bound.params.merges = reinterpret_cast<const WorkItem*>(data_of(merges));
  bound.params.partial_o = reinterpret_cast<float*>(data_of(partial_o));
  bound.params.partial_lse = reinterpret_cast<float*>(data_of(partial_lse));
  bound.params.partial_sum =
      partial_sum.has_value() ? reinterpret_cast<float*>(data_of(*partial_sum)) : nullptr;
  bound.params.partial_rows = int32_t(partial_rows);
  bound.params.worker_state = worker_state;
  bound.params.workers = int32_t(workers);
  bound.params.kv_heads = int32_t(kv_heads);
  bound.params.group = int32_t(group);
  bound.params.profile = profile.has_value() ? reinterpret_cast<uint64_t*>(data_of(*profile)) : nullptr;
  if (tile_list.has_value()) {  // [lines, width]
    bound.params.tile_list = reinterpret_cast<const int32_t*>(data_of(*tile_list));
    bound.params.tile_list_width = int32_t((*tile_list).size(1));
  }
  bound.params.levels = reinterpret_cast<const Levels*>(levels);
  bound.params.prefixes = tree.prefixes;
  bound.params.places = tree.places;
}

void run(const BoundPlan& bound, int64_t function, int64_t error_text, const TensorView& q,
         const TensorView& k, const TensorView& v, const TensorView& out, const Optional<TensorView>& lse,
         double scale, const char* variant_args, size_t variant_bytes) {
  bool gpu = bound.device.device_type != kDLCPU;
  check_rows(bound, q, out, lse, gpu);
  check_cache(bound, q, k, v, gpu);
  FI_REQUIRE(variant_bytes <= kMaxVariantBytes, ValueError)
      << "expected at most " << kMaxVariantBytes << " bytes of variant arguments, got " << variant_bytes;
  // a row's largest score gives its largest logit only if the scale is positive
  FI_REQUIRE(float(scale) > 0.f && std::isfinite(float(scale)), ValueError)
      << "expected a finite scale above 0 in float32, got " << scale;
  if (!gpu) {  // lengths are readable here, and a GPU cannot be asked without waiting for it
    int32_t tokens = bound.params.batch.qo_indptr[bound.params.batch.num_requests];
    FI_REQUIRE(tokens <= q.size(0), ValueError)
        << "expected q of at least " << tokens << " tokens (qo_indptr ends there), got " << q.size(0);
  }
  if (q.size(0) == 0) return;

  AttentionParams p = bound.params;
  p.q = data_of(q);
  p.out = data_of(out);
  p.lse = lse.has_value() ? reinterpret_cast<float*>(data_of(*lse)) : nullptr;
  p.tokens = int32_t(q.size(0));
  p.q_token = q.stride(0), p.q_head = q.stride(1);
  p.o_token = out.stride(0), p.o_head = out.stride(1);
  p.kv = cache_view(k, v);
  p.scale = float(scale);
  std::memcpy(p.variant_args, variant_args, variant_bytes);
  call_library(function, error_text, p, bound.device, "attention");
}

}  // namespace fi::core
