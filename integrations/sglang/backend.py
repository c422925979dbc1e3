"""SGLang's attention backend `fi`: one Step per forward, one AttentionLayer per model layer.

Serves SGLang 0.5.16 to 0.5.23. No device value is read on the host.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention import base_attn_backend as base
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from fi_backend import KVCache
from fi_backend.serving.layer import Layers
from fi_backend.serving.refuse import check_unknown
from fi_backend.serving.shapes import Planners
from fi_backend.serving.sharing import Sharing
from fi_backend.serving.tree import words_of_mask

from .limits import check_runner, layer_options
from .step import CROSS, SELF, SWA, Draft, Step

WHOLE_PAGES = (PagedTokenToKVPoolAllocator, SWATokenToKVPoolAllocator)


class FiAttentionBackend(base.AttentionBackend):
    needs_cpu_seq_lens = False  # plans come from the device's lengths alone

    def __init__(self, runner: Any, draft: Draft | None = None) -> None:
        super().__init__()
        check_runner(runner)
        # read by the rest of SGLang
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.req_to_token_pool = runner.req_to_token_pool
        self.max_context_len = runner.model_config.context_len
        self.forward_metadata: Any = None  # the Step of this forward

        # pages are read as a whole only where the allocator keeps a page's tokens together
        self.page_size = runner.page_size if type(runner.token_to_kv_pool_allocator) in WHOLE_PAGES else 1
        args, table = runner.server_args, self.req_to_token_pool.req_to_token
        invariant = bool(args.enable_deterministic_inference)
        sharing = Sharing(
            requests=(1, self.req_to_token_pool.size),
            tokens=getattr(args, "speculative_num_draft_tokens", None) or 1,
            max_kv_len=table.shape[1],
            never={"the radix cache is off": getattr(args, "disable_radix_cache", False)},
        )
        overlapping = getattr(args, "enable_pdmux", False)  # prefills run beside decodes
        self.planners = Planners(table.device, sharing, batch_invariant=invariant, overlapping=overlapping)
        options = {"dtype": runner.dtype, "device": table.device, "batch_invariant": invariant}
        self._layers = Layers(layer_options, sharing=sharing, **options)
        self._draft = draft
        self._graph_tree = torch.empty(0, dtype=torch.int64, device=table.device)
        modules = getattr(runner, "model", torch.nn.Module()).modules()
        self.planners.serve(self._layers.get(m) for m in modules if isinstance(m, RadixAttention))

    def shared_read_ends(self, mode: Any) -> Any:
        """From SGLang 0.5.19 on: the engine's tables are read in place until the last layer."""
        return base.SharedReadEnds.UNKNOWN

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self.forward_metadata = Step(self, forward_batch, uniform=False, draft=self._draft)
        self.update_verify_buffers_to_fill_after_draft(forward_batch.spec_info, None)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.planners.at_least = (max_bs, max_num_tokens)
        self._graph_tree = self._graph_tree.new_zeros(max_num_tokens)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        self.forward_metadata = Step(self, forward_batch, uniform=True, draft=self._draft)
        self.update_verify_buffers_to_fill_after_draft(forward_batch.spec_info, forward_batch.batch_size)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        self.forward_metadata.restart()

    def draft_extend_metadata_captured_in_graph(self) -> bool:
        return True

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def update_verify_buffers_to_fill_after_draft(self, spec_info: Any, cuda_graph_bs: int | None) -> None:
        """The step's tree, which may be known only after it was prepared. Chains (topk 1) are causal."""
        step = self.forward_metadata
        mask = getattr(spec_info, "custom_mask", None)
        verifies = step.batch.forward_mode.is_target_verify()
        if not verifies or mask is None or getattr(spec_info, "topk", None) == 1:
            return
        seq_lens = step.batch.seq_lens[: step.batch.batch_size]
        words = words_of_mask(mask, seq_lens, spec_info.draft_token_num)
        if cuda_graph_bs is not None:  # a captured graph holds the address
            words = self._graph_tree[: words.shape[0]].copy_(words)
        step.tree_mask = words

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """q [T, q_heads * head_dim]; k, v [T, kv_heads, head_dim], or None: the cache alone is read.

        Returns [T, q_heads * v_head_dim]. Writes k and v to the cache unless told not to.
        """
        step, pool = self.forward_metadata, self.token_to_kv_pool
        sinks = kwargs.pop("sinks", None)
        check_unknown(kwargs)
        cross = layer.is_cross_attention
        if k is not None and save_kv_cache:
            loc = forward_batch.encoder_out_cache_loc if cross else forward_batch.out_cache_loc
            pool.set_kv_buffer(layer, KVWriteLoc(loc, step.swa_loc(loc)), k, v, layer.k_scale, layer.v_scale)
        q = q.reshape(-1, layer.tp_q_head_num, layer.head_dim)  # Gemma 3 hands over [1, T, q_heads, head_dim]
        swa = getattr(pool, "layers_mapping", {}).get(layer.layer_id, (0, False))[1]
        attention, tree = self._layers.get(layer, sinks), {}
        plan = step.plan(attention.shape, CROSS if cross else SWA if swa else SELF, q.shape[0])
        mask = step.tree_mask  # after step.plan, which makes a draft's
        if mask is not None and attention.shape.causal:
            attention = self._layers.get(layer, sinks, tree=True)
            tree = {"tree_mask": mask, "tree_tokens": len(mask) // plan.batch.num_requests}
        out = getattr(forward_batch, "_attn_output", None)  # the prefill graph's own buffer
        if out is None:
            out = q.new_empty(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)
        # asked every time: the pool may have to wait for keys that come back from the host
        kv = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        cache = attention.kv(lambda k, v: KVCache.slots(k, v, plan.batch.page_size), *kv)
        attention.run(plan, q, cache, out.view(-1, layer.tp_q_head_num, layer.v_head_dim), **tree)
        return out

    forward_decode = forward_extend
