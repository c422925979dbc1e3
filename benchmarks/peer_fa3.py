"""FlashAttention-3 as vLLM packs it, called as vLLM does outside graphs: scheduler metadata once per step."""

from __future__ import annotations

import torch

from .data import Data
from .implementations import Prepare, Prepared, Unsupported, refuse_variants


def _schedule(
    data: Data, qo_indptr: torch.Tensor, max_q: int, kv_len: torch.Tensor, max_kv: int, causal: bool = True
) -> torch.Tensor:
    from vllm.vllm_flash_attn import get_scheduler_metadata

    case = data.case
    refuse_variants(case)
    if case.page_size == 1:
        raise Unsupported("FA3 refuses page size 1")
    return get_scheduler_metadata(
        batch_size=len(kv_len),
        max_seqlen_q=max_q,
        max_seqlen_k=max_kv,
        num_heads_q=case.q_heads,
        num_heads_kv=case.kv_heads,
        headdim=case.head_dim,
        cache_seqlens=kv_len,
        qkv_dtype=data.q.dtype,
        cu_seqlens_q=qo_indptr,
        page_size=case.page_size,
        causal=causal,
    )


def _fa3(data: Data) -> Prepared:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    max_q, max_kv = max(data.case.q_lens), max(data.case.kv_lens)

    def plan() -> torch.Tensor:
        return _schedule(data, data.qo_indptr, max_q, data.kv_len, max_kv)

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


def _cascade(data: Data) -> Prepared:
    """The shared prefix as one request of all rows, the rest request by request, and vLLM's merge."""
    case = data.case
    if not case.prefix or case.groups:
        raise Unsupported("no prefix is shared by all")
    from vllm.v1.attention.backends.flash_attn import cascade_attention  # needs all of vLLM

    max_q, max_kv = max(case.q_lens), max(case.kv_lens)
    device = data.q.device
    rows = torch.tensor([0, case.tokens], dtype=torch.int32, device=device)
    prefix_len = torch.tensor([case.prefix], dtype=torch.int32, device=device)
    suffix_len = data.kv_len - case.prefix

    def plan() -> tuple[torch.Tensor, torch.Tensor]:
        prefix = _schedule(data, rows, case.tokens, prefix_len, case.prefix, causal=False)
        return prefix, _schedule(data, data.qo_indptr, max_q, suffix_len, max_kv - case.prefix)

    prefix_metadata, suffix_metadata = plan()

    def run() -> torch.Tensor:
        cascade_attention(
            data.out,
            data.q,
            data.k,
            data.v,
            cu_query_lens=data.qo_indptr,
            max_query_len=max_q,
            cu_prefix_query_lens=rows,
            prefix_kv_lens=prefix_len,
            suffix_kv_lens=suffix_len,
            max_kv_len=max_kv,
            softmax_scale=case.head_dim**-0.5,
            alibi_slopes=None,
            sliding_window=(-1, -1),
            logits_soft_cap=0.0,
            block_table=data.block_table,
            common_prefix_len=case.prefix,
            max_num_splits=0,
            fa_version=3,
            prefix_scheduler_metadata=prefix_metadata,
            suffix_scheduler_metadata=suffix_metadata,
        )
        return data.out

    return Prepared(plan, run)


PEERS: dict[str, Prepare] = {"fa3": _fa3, "vllm_fa3_cascade": _cascade}
