"""FlashAttention-3 as vLLM packs and calls it."""

from __future__ import annotations

import torch

from .data import Data
from .implementations import Prepared, Unsupported


def fa3(data: Data) -> Prepared:
    """vLLM's FlashAttention-3, called as vLLM does outside graphs: scheduler metadata once per step."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    case = data.case
    if case.page_size == 1:
        raise Unsupported("FA3 refuses page size 1")
    max_q, max_kv = max(case.q_lens), max(case.kv_lens)

    def plan() -> torch.Tensor:
        return get_scheduler_metadata(
            batch_size=len(case.q_lens),
            max_seqlen_q=max_q,
            max_seqlen_k=max_kv,
            num_heads_q=case.q_heads,
            num_heads_kv=case.kv_heads,
            headdim=case.head_dim,
            cache_seqlens=data.kv_len,
            qkv_dtype=data.q.dtype,
            cu_seqlens_q=data.qo_indptr,
            page_size=case.page_size,
            causal=True,
        )

    metadata = plan()

    def run() -> torch.Tensor:
        return flash_attn_varlen_func(
            q=data.q,
            k=data.k,
            v=data.v,
            max_seqlen_q=max_q,
            cu_seqlens_q=data.qo_indptr,
            max_seqlen_k=max_kv,
            seqused_k=data.kv_len,
            causal=True,
            block_table=data.block_table,
            out=data.out,
            scheduler_metadata=metadata,
            fa_version=3,
        )

    return Prepared(plan, run)
