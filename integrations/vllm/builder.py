"""Once per step and cache group: engine tables in, one plan out. No device value is read on the host.

Groups whose plans have equal inputs share a planner and its buffers: the first of them plans, the others take
that plan with their own page table. Captured graphs hold the addresses of those buffers, and every step
writes its plan into them, on the current stream, before the replay.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, ClassVar

import numpy as np
import torch
from vllm import envs
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

import fi_backend

from . import kernels
from .limits import check_engine, refuse


class FiMetadata(AttentionMetadata):
    """What one step hands to the layers of a group. Open: vLLM's wrappers set attributes on it."""

    def __init__(
        self, plan: fi_backend.Plan, shared: SharedPlanner, slot_mapping: torch.Tensor, num_actual_tokens: int
    ) -> None:
        self.plan = plan
        self.slot_mapping = slot_mapping
        self.num_actual_tokens = num_actual_tokens
        self._shared = shared
        self._step = shared.step

    def plan_for_layer(self) -> fi_backend.Plan:
        if self._step != self._shared.step:
            raise RuntimeError(
                f"fi_backend: plan {self._step} was overwritten by plan {self._shared.step} before its "
                "layers ran: two cache groups that share a planner got different lengths in one step"
            )
        return self.plan


class SharedPlanner:
    """One planner for builders of equal plan inputs. `step` counts the plans written into its buffers."""

    def __init__(self, planner: fi_backend.Planner, key: tuple[Any, ...]) -> None:
        self.planner = planner
        self.key = key
        self.layers: set[str] = set()
        self.step = 0
        self._plan: fi_backend.Plan | None = None
        self._inputs: tuple[Any, ...] = ()
        self._lengths: tuple[Any, Any] = (None, None)  # held, so that an id is never reused
        self._served: set[int] = set()

    def plan(
        self, builder: int, batch: fi_backend.BlockSparse, common: CommonAttentionMetadata
    ) -> fi_backend.Plan:
        """The plan of this step. A builder that already has the current one is in a new step: it plans again.

        Both runners make new views of the lengths in every step, so the same objects mean the same step; the
        sizes are compared too, for a runner that would keep its views.
        """
        inputs = (common.num_reqs, common.num_actual_tokens, common.max_query_len, common.max_seq_len)
        starts, lengths = self._lengths
        if (
            self._plan is not None
            and starts is common.query_start_loc
            and lengths is common.seq_lens
            and builder not in self._served
            and inputs == self._inputs
        ):
            self._served.add(builder)
            return self._plan.rebind(batch)
        self.step += 1
        self._plan = self.planner.plan(batch)
        self._inputs = inputs
        self._lengths = (common.query_start_loc, common.seq_lens)
        self._served = {builder}
        return self._plan


_planners: weakref.WeakValueDictionary[int, SharedPlanner] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def planners() -> list[SharedPlanner]:
    """Those of this process that are alive, oldest first."""
    return list(_planners.values())


def plans_written() -> int:
    """Plans that builders of this process have made: 0 if another backend served."""
    return sum(shared.step for shared in planners())


def _shared_planner(layer_names: list[str], key: tuple[Any, ...], options: dict[str, Any]) -> SharedPlanner:
    # A layer that is already served by a planner has a second builder for another purpose (micro-batches that
    # run side by side, a draft loop): that one must not write into the same buffers. The oldest that fits is
    # taken, so the first micro-batch of one cache group never shares with the second of another.
    for shared in planners():
        if shared.key == key and shared.layers.isdisjoint(layer_names):
            break
    else:
        shared = SharedPlanner(fi_backend.Planner(**options), key)
        _planners[next(_numbers)] = shared
    shared.layers.update(layer_names)
    return shared


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
        kernels.load()
        model = vllm_config.model_config
        q_heads = {layer.num_heads for layer in layers}
        max_requests, max_tokens = _capacity(vllm_config)
        options = {
            "q_heads": q_heads.pop()
            if q_heads
            else model.get_num_attention_heads(vllm_config.parallel_config),
            "kv_heads": kv_cache_spec.num_kv_heads,
            "head_dim": kv_cache_spec.head_size,
            "max_requests": max_requests,
            "max_tokens": max_tokens,
            "causal": True,
            # Only a window of the cache spec holds for every layer of the group; a full-attention group may
            # contain windowed layers, which mask by their own variant.
            "window": getattr(kv_cache_spec, "sliding_window", None) if _is_sliding(kv_cache_spec) else None,
            "device": torch.device(device),
        }
        # wrappers of vLLM subclass this builder and change the lengths before they call build
        key: tuple[Any, ...] = (id(vllm_config), type(self), *options.values())
        if getattr(vllm_config.parallel_config, "use_ubatching", False):
            # vLLM cuts the lengths into micro-batches anew for every group: they cannot be known to be equal
            key += tuple(layer_names)
        self._shared = _shared_planner(layer_names, key, options)
        self._page_size: int = kv_cache_spec.block_size
        self._id = id(self)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> FiMetadata:
        """Device lengths in, plan on the device out: no synchronisation, nothing is allocated per step."""
        common = common_attn_metadata
        if common.causal is not True:
            _refuse_mask(common.causal)
        batch = fi_backend.BlockSparse.from_block_table(
            common.query_start_loc, common.seq_lens, common.block_table_tensor, self._page_size
        )
        plan = self._shared.plan(self._id, batch, common)
        return FiMetadata(plan, self._shared, common.slot_mapping, common.num_actual_tokens)


def _is_sliding(spec: Any) -> bool:
    return type(spec).__name__ == "SlidingWindowSpec"


def _capacity(config: Any) -> tuple[int, int]:
    """Most requests and tokens of a step. A captured batch may be padded beyond the scheduler's limits."""
    scheduler = config.scheduler_config
    graph = config.compilation_config.max_cudagraph_capture_size or 0
    speculative = config.speculative_config
    # a verify step carries the drafts of every request, a parallel draft twice as many
    drafts = 2 * (speculative.num_speculative_tokens or 0) if speculative else 0
    requests = max(scheduler.max_num_seqs, graph)
    tokens = max(scheduler.max_num_batched_tokens, graph, scheduler.max_num_seqs * (1 + drafts))
    return requests, tokens


def _refuse_mask(causal: Any) -> None:
    if isinstance(causal, torch.Tensor):
        refuse("a per-request mix of causal and bidirectional attention is not supported")
    if not (isinstance(causal, (bool, np.bool_)) and causal):
        refuse(f"expected causal decoder attention, got causal={causal}")
