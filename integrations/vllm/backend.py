"""What vLLM's selector asks: which shapes, dtypes and features this backend takes. Never instantiated.

Serves vLLM 0.26 to 0.33. Methods take *args, **kwargs where signatures differ between those versions.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf

from fi_backend.serving.refuse import MIN_CAPABILITY, takes_dtype, takes_head_size

from .builder import FiMetadataBuilder
from .impl import FiAttentionImpl
from .limits import KV_CACHE_DTYPES


def _always(answer: bool) -> Any:
    return classmethod(lambda cls, *args, **kwargs: answer)


class FiAttentionBackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(KV_CACHE_DTYPES)
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # must be a member of vLLM's enum

    @staticmethod
    def get_impl_cls() -> type[FiAttentionImpl]:
        return FiAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[FiMetadataBuilder]:
        return FiMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(*args: Any, **kwargs: Any) -> list[int | MultipleOf]:
        # Any size runs. vLLM gives sliding-window layers the smallest size declared here, and tables of
        # single-token pages cost more to read than they save.
        return [MultipleOf(16)]

    # KV cache, vLLM <= 0.28: logical [blocks, kv_heads, block_size, 2 * head_size], strides read when used.
    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, *args: Any, **kwargs: Any
    ) -> tuple[int, ...]:
        return (num_blocks, num_kv_heads, block_size, 2 * head_size)

    @staticmethod
    def get_kv_cache_stride_order(
        include_num_layers_dimension: bool = False, *args: Any, **kwargs: Any
    ) -> tuple[int, ...]:
        from vllm.v1.attention.backends.utils import get_kv_cache_layout

        if get_kv_cache_layout() == "HND":
            return (1, 2, 0, 3, 4) if include_num_layers_dimension else (0, 1, 2, 3)
        return (1, 0, 3, 2, 4) if include_num_layers_dimension else (0, 2, 1, 3)

    @classmethod
    def supported_kv_cache_layouts(cls) -> None:
        """vLLM >= 0.29: None, any layout is fine and none is preferred."""
        return None  # noqa: RET501

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return takes_head_size(head_size, current_platform.is_cpu())

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        return takes_dtype(dtype, current_platform.is_cpu())

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return capability.major >= MIN_CAPABILITY

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    # Said one by one because defaults move between versions.
    supports_sink = supports_sliding_window = supports_kv_connector = _always(True)
    supports_device_cpu_query_lens_mismatch = _always(True)  # plans come from the device lengths alone
    is_mla = is_sparse = supports_non_causal = supports_mm_prefix = supports_rswa = _always(False)
    supports_alibi_sqrt = supports_per_head_quant_scales = supports_batch_invariance = _always(False)
    supports_pcp = supports_dcp = _always(False)
