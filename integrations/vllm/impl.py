"""One attention layer: two calls per step (write K and V, attend)."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType

import fi_backend
from fi_backend.serving.layer import AttentionLayer
from fi_backend.serving.own_variant import variant_option
from fi_backend.serving.refuse import refuse

from .builder import FiMetadata, sharing_of
from .limits import check_layer


class FiAttentionImpl(AttentionImpl[FiMetadata]):
    supports_dcp = supports_pcp = can_return_lse_for_decode = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **extra: Any,
    ) -> None:
        config = get_current_vllm_config()
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        check_layer(kv_cache_dtype, attn_type, extra)
        self.attention = AttentionLayer(
            q_heads=num_heads,
            kv_heads=self.num_kv_heads,
            head_dim=head_size,
            scale=scale,
            dtype=config.model_config.dtype,
            device=config.device_config.device,
            window=sliding_window,
            soft_cap=logits_soft_cap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            own=variant_option(config.additional_config),
            sharing=sharing_of(config),
        )
        self._sinks = sinks

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        if self._sinks is not None:
            self.attention.load_sinks(self._sinks)

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # key may be longer than slot_mapping (graph padding)
        fi_backend.append(self.attention.kv(self.attention.packed, kv_cache), key, value, slot_mapping)

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FiMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """query, output [T, heads, head_size]; rows past the plan's tokens (graph padding) are left alone."""
        if attn_metadata is None:  # profile run: there is no cache yet
            return output.zero_()
        if output_scale is not None or output_block_scale is not None:
            refuse("quantised output is not supported")
        kv = self.attention.kv(self.attention.packed, kv_cache)
        return self.attention.run(attn_metadata.plan_for_layer(), query, kv, output)
