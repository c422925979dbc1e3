"""SGLang's attention backend `fi`: one Step per forward, one AttentionLayer per model layer.

Serves SGLang 0.5.16 to 0.5.23. No device value is read on the host.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

import fi_backend
from fi_backend.serving import kernels
from fi_backend.serving.layer import AttentionLayer
from fi_backend.serving.plans import workspace
from fi_backend.serving.refuse import check_unknown
from fi_backend.serving.shapes import Planners
from fi_backend.serving.tree import words_of_mask

from .limits import check_layer, check_runner
from .step import CROSS, SELF, SWA, Draft, Step


class FiAttentionBackend(AttentionBackend):
    needs_cpu_seq_lens = False  # plans come from the device's lengths alone

    def __init__(self, runner: Any, draft: Draft | None = None) -> None:
        super().__init__()
        check_runner(runner)
        # read by the rest of SGLang
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.req_to_token_pool = runner.req_to_token_pool
        self.max_context_len = runner.model_config.context_len
        self.forward_metadata: Step | None = None

        self.page_size = _page_size(runner)
        args, table = runner.server_args, self.req_to_token_pool.req_to_token
        self._draft = draft
        self._options: dict[str, Any] = {"dtype": runner.dtype, "device": table.device}
        planners: dict[str, Any] = {"device": table.device}
        if args.enable_deterministic_inference:
            self._options["batch_invariant"] = True
            planners |= {"batch_invariant": True, "max_kv_len": table.shape[1]}
        if not getattr(args, "enable_pdmux", False):  # there prefills and decodes run side by side
            planners["workspace"] = workspace
        self.planners = Planners(**planners)
        self._layers: WeakKeyDictionary[RadixAttention, dict[tuple[bool, bool], AttentionLayer]]
        self._layers = WeakKeyDictionary()
        self._graph_tree: torch.Tensor | None = None  # [tokens of the largest graph] int64
        if (model := getattr(runner, "model", None)) is not None:
            for layer in model.modules():
                if isinstance(layer, RadixAttention):
                    self._layer(layer, sinks=None, tree=False)
            kernels.load()

    def shared_read_ends(self, mode: Any) -> Any:
        """From SGLang 0.5.19 on: the engine's tables are read in place until the last layer."""
        from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds

        return SharedReadEnds.UNKNOWN

    # once per forward

    def init_forward_metadata(self, forward_batch: Any) -> None:
        step = self.forward_metadata = Step(self, forward_batch, uniform=False, draft=self._draft)
        if _has_tree(forward_batch):
            spec = forward_batch.spec_info
            step.tree_mask = words_of_mask(spec.custom_mask, forward_batch.seq_lens, spec.draft_token_num)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.planners.at_least = (max_bs, max_num_tokens)
        self._graph_tree = torch.zeros(
            max_num_tokens, dtype=torch.int64, device=self.req_to_token_pool.req_to_token.device
        )

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        self.forward_metadata = Step(self, forward_batch, uniform=True, draft=self._draft)
        if _has_tree(forward_batch):
            self.update_verify_buffers_to_fill_after_draft(forward_batch.spec_info, forward_batch.batch_size)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        assert self.forward_metadata is not None
        self.forward_metadata.restart()

    def draft_extend_metadata_captured_in_graph(self) -> bool:
        return True

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def update_verify_buffers_to_fill_after_draft(self, spec_info: Any, cuda_graph_bs: int | None) -> None:
        """The tree of a step that was prepared before its drafts were there."""
        step = self.forward_metadata
        assert step is not None
        if not _has_tree(step.batch):
            return
        seq_lens = step.batch.seq_lens[: step.batch.batch_size]
        words = words_of_mask(spec_info.custom_mask, seq_lens, spec_info.draft_token_num)
        if cuda_graph_bs is not None:  # a captured graph holds the address
            assert self._graph_tree is not None
            words = self._graph_tree[: words.shape[0]].copy_(words)
        step.tree_mask = words

    # once per layer

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
        assert step is not None, "expected init_forward_metadata before the first layer"
        sinks = kwargs.pop("sinks", None)
        check_unknown(kwargs)
        cross = layer.is_cross_attention
        if k is not None and save_kv_cache:
            loc = forward_batch.encoder_out_cache_loc if cross else forward_batch.out_cache_loc
            pool.set_kv_buffer(layer, KVWriteLoc(loc, step.swa_loc(loc)), k, v, layer.k_scale, layer.v_scale)
        q = q.reshape(-1, layer.tp_q_head_num, layer.head_dim)  # Gemma 3 hands over [1, T, q_heads, head_dim]
        swa = getattr(pool, "layers_mapping", {}).get(layer.layer_id, (0, False))[1]
        plain = self._layer(layer, sinks, tree=False)
        plan = step.plan(plain.shape, CROSS if cross else SWA if swa else SELF, q.shape[0])
        attention, tree = plain, {}
        if step.tree_mask is not None and plain.shape.causal:  # after step.plan, which makes a draft's
            attention = self._layer(layer, sinks, tree=True)
            tree = {
                "tree_mask": step.tree_mask,
                "tree_tokens": len(step.tree_mask) // plan.batch.num_requests,
            }
        out = getattr(forward_batch, "_attn_output", None)  # the prefill graph's own buffer
        if out is None:
            out = q.new_empty(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)
        # asked every time: the pool may have to wait for keys that come back from the host
        kv = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        attention.run(
            plan,
            q,
            attention.kv(lambda k, v: fi_backend.KVCache.slots(k, v, plan.batch.page_size), *kv),
            out.view(-1, layer.tp_q_head_num, layer.v_head_dim),
            **tree,
        )
        return out

    forward_decode = forward_extend

    def _layer(self, layer: RadixAttention, sinks: torch.Tensor | None, tree: bool) -> AttentionLayer:
        made = self._layers.setdefault(layer, {})
        found = made.get((sinks is not None, tree))
        if found is None:
            check_layer(layer)
            found = made[sinks is not None, tree] = AttentionLayer(
                q_heads=layer.tp_q_head_num,
                kv_heads=layer.tp_k_head_num,
                head_dim=layer.head_dim,
                head_dim_vo=layer.v_head_dim,
                scale=layer.scaling,
                causal=_causal(layer),
                window=_window(layer),
                soft_cap=layer.logit_cap if layer.logit_cap > 0 else None,
                sinks=sinks,
                tree=tree,
                **self._options,
            )
        elif sinks is not None:  # weights may be loaded again, also under a captured graph
            found.load_sinks(sinks)
        return found


def _page_size(runner: Any) -> int:
    """Pages are read as a whole only where the allocator keeps a page's tokens together."""
    whole = (PagedTokenToKVPoolAllocator, SWATokenToKVPoolAllocator)
    return runner.page_size if type(runner.token_to_kv_pool_allocator) in whole else 1


def _causal(layer: RadixAttention) -> bool:
    return not layer.is_cross_attention and layer.attn_type != AttentionType.ENCODER_ONLY


def _window(layer: RadixAttention) -> int | None:
    """SGLang counts the keys before a query's own."""
    size = layer.sliding_window_size
    return None if size is None or size < 0 else size + 1


def _has_tree(batch: Any) -> bool:
    """Chains (topk 1) are causal, whatever mask comes with them."""
    spec = batch.spec_info
    return (
        batch.forward_mode.is_target_verify()
        and getattr(spec, "custom_mask", None) is not None
        and getattr(spec, "topk", None) != 1
    )
