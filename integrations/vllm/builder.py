"""Once per step and cache group: engine tables in, one plan out. No device value is read on the host.

Groups whose plans have equal inputs share a planner and its buffers: the first of them plans, the others take
that plan with their own page table, except where prefixes are shared. Captured graphs hold the addresses of
those buffers, and every step writes its plan into them, on the current stream, before the replay.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm import envs
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from fi_backend import BlockSparse, Plan
from fi_backend.serving import plans
from fi_backend.serving.own_variant import variant_option
from fi_backend.serving.sharing import Sharing

from .limits import check_engine, check_mask


class FiMetadata(AttentionMetadata):
    """What one step hands to the layers of a group. Open: vLLM's wrappers set attributes on it."""

    def __init__(
        self, plan: Plan, shared: plans.SharedPlanner, slot_mapping: torch.Tensor, num_actual_tokens: int
    ) -> None:
        self.plan = plan
        self.slot_mapping = slot_mapping
        self.num_actual_tokens = num_actual_tokens
        self._shared = shared
        self._step = shared.step

    def plan_for_layer(self) -> Plan:
        self._shared.check(self._step)
        return self.plan


class FiMetadataBuilder(AttentionMetadataBuilder[FiMetadata]):
    # Grid, buffers and kernel depend on capacities only, so a graph captured with query lengths of 1 serves
    # any split of its tokens over requests.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS
    reorder_batch_threshold: int | None = None
    supports_update_block_table: bool = False

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: Any,
        device: torch.device,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        known = vllm_config.compilation_config.static_forward_context
        layers = [known[name] for name in layer_names if name in known]
        check_engine(vllm_config, kv_cache_spec, layers, batch_invariant=envs.VLLM_BATCH_INVARIANT)
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        sliding = type(kv_cache_spec).__name__ == "SlidingWindowSpec"
        self._shared = plans.share(
            layer_names,
            # wrappers of vLLM subclass this builder and change the lengths before they call build
            (id(vllm_config), type(self)),
            # vLLM cuts the lengths into micro-batches anew for every group: they cannot be known to be equal
            overlapping=getattr(parallel, "use_ubatching", False),
            layers=[layer.impl.attention for layer in layers],
            sharing=sharing_of(vllm_config),
            q_heads=layers[0].num_heads if layers else model.get_num_attention_heads(parallel),
            kv_heads=kv_cache_spec.num_kv_heads,
            head_dim=kv_cache_spec.head_size,
            # Only a window of the cache spec holds for every layer of the group; a full-attention group may
            # contain windowed layers, which mask by their own variant.
            window=kv_cache_spec.sliding_window if sliding else None,
            device=torch.device(device),
            **_capacity(vllm_config),
        )
        self._page_size: int = kv_cache_spec.block_size

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, *args: Any, **kwargs: Any
    ) -> FiMetadata:
        """Device lengths in, plan on the device out: no synchronisation, nothing is allocated per step."""
        common = common_attn_metadata
        if common.causal is not True:
            check_mask(common.causal)
        batch = BlockSparse.from_block_table(
            common.query_start_loc, common.seq_lens, common.block_table_tensor, self._page_size
        )
        # both runners make new views of the lengths in every step
        plan = self._shared.plan(
            id(self), batch, common.num_actual_tokens, common.max_query_len, common.max_seq_len
        )
        return FiMetadata(plan, self._shared, common.slot_mapping, common.num_actual_tokens)


def sharing_of(config: Any) -> Sharing:
    speculative, own = config.speculative_config, variant_option(config.additional_config)
    tokens = 1 + (speculative.num_speculative_tokens or 0 if speculative else 0)
    never = {"the engine's prefix caching is off": not config.cache_config.enable_prefix_caching}
    requests, longest = _capacity(config)["max_requests"], config.model_config.max_model_len
    return Sharing((requests,), tokens, longest, never, own)


def _capacity(config: Any) -> dict[str, int]:
    """Most requests and tokens of a step. A captured batch may be padded beyond the scheduler's limits."""
    scheduler = config.scheduler_config
    graph = config.compilation_config.max_cudagraph_capture_size or 0
    speculative = config.speculative_config
    # a verify step carries the drafts of every request, a parallel draft twice as many
    drafts = 2 * (speculative.num_speculative_tokens or 0) if speculative else 0
    tokens = max(scheduler.max_num_batched_tokens, graph, scheduler.max_num_seqs * (1 + drafts))
    return {"max_requests": max(scheduler.max_num_seqs, graph), "max_tokens": tokens}
