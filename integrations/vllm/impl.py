"""One attention layer: its variant, its arguments, and two calls per step (write K and V, attend)."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType

import fi_backend
from fi_backend.variants import compose

from . import kernels
from .builder import FiMetadata
from .limits import check_layer, refuse


class FiAttentionImpl(AttentionImpl[FiMetadata]):
    supports_dcp = False
    supports_pcp = False
    can_return_lse_for_decode = False

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
        device = torch.device(config.device_config.device)
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        check_layer(
            head_size=head_size,
            num_heads=num_heads,
            num_kv_heads=self.num_kv_heads,
            scale=self.scale,
            kv_cache_dtype=kv_cache_dtype,
            attn_type=attn_type,
            on_cpu=device.type == "cpu",
            extra=extra,
        )
        self.variant = compose(
            causal=True,
            window=sliding_window is not None,
            soft_cap=bool(logits_soft_cap),
            alibi=alibi_slopes is not None,
            sinks=sinks is not None,
        )
        self._args: dict[str, Any] = {}
        if sliding_window is not None:
            self._args["window"] = sliding_window
        if logits_soft_cap:
            self._args["soft_cap"] = float(logits_soft_cap)
        if alibi_slopes is not None:
            self._args["alibi_slopes"] = torch.tensor(alibi_slopes, dtype=torch.float32, device=device)
        self._sinks = sinks
        if sinks is not None:
            if sinks.shape != (num_heads,):
                refuse(f"expected sinks [{num_heads}] (query heads), got {list(sinks.shape)}")
            # fixed address: captured graphs hold it, and weights may be loaded again later
            self._args["sinks"] = torch.empty(num_heads, dtype=torch.float32, device=sinks.device)
        # a value that the kernels refuse ends the start, not the first step
        tensors = (x for x in self._args.values() if isinstance(x, torch.Tensor))
        self.variant.pack(self._args, num_heads, next((x.device for x in tensors), device))
        self._cache: torch.Tensor | None = None
        self._kv: fi_backend.KVCache | None = None
        kernels.start(device, config.model_config.dtype, head_size, self.variant)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        if self._sinks is not None:
            self._args["sinks"].copy_(self._sinks)

    def _kv_cache(self, cache: torch.Tensor) -> fi_backend.KVCache:
        # vLLM passes the same tensor object until it allocates a new cache
        if cache is not self._cache:
            if cache.dim() != 4 or cache.shape[3] != 2 * self.head_size:
                raise ValueError(
                    f"expected a packed KV cache [blocks, kv_heads, block_size, {2 * self.head_size}], "
                    f"got {list(cache.shape)}"
                )
            self._cache, self._kv = cache, fi_backend.KVCache.packed(cache)
        assert self._kv is not None
        return self._kv

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
        fi_backend.append(self._kv_cache(kv_cache), key, value, slot_mapping)

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
        return fi_backend.run(
            attn_metadata.plan_for_layer(),
            query,
            self._kv_cache(kv_cache),
            output,
            variant=self.variant,
            scale=self.scale,
            **self._args,
        )
