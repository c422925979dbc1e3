"""Who is measured. An implementation turns Data into what an engine does once a step and once a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from .data import Data


class Unsupported(Exception):
    """The implementation does not take the case; the text says why."""


@dataclass(frozen=True)
class Prepared:
    plan: Callable[[], object]  # once per step
    run: Callable[[], torch.Tensor]  # once per layer; returns out [tokens, q_heads, D]; needs a plan


def fi(data: Data) -> Prepared:
    import fi_backend

    case = data.case
    batch = fi_backend.BlockSparse.from_block_table(
        data.qo_indptr, data.kv_len, data.block_table, case.page_size
    )
    planner = fi_backend.Planner(
        q_heads=case.q_heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        max_requests=len(case.q_lens),
        max_tokens=case.tokens,
        max_kv_len=max(case.kv_lens),
        device=data.q.device,
    )
    kv = fi_backend.KVCache.separate(data.k, data.v, "NHD")
    plan = planner.plan(batch)
    return Prepared(lambda: planner.plan(batch), lambda: fi_backend.run(plan, data.q, kv, data.out))


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


@cache
def _flashinfer_workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(512 << 20, dtype=torch.uint8, device=device)  # zero: a demand of the decode wrapper


def _last_page_len(data: Data) -> torch.Tensor:
    return (data.kv_len - 1) % data.case.page_size + 1


def _flashinfer_prefill(backend: str) -> Callable[[Data], Prepared]:
    def prepare(data: Data) -> Prepared:
        import flashinfer

        case = data.case
        indptr, indices = data.csr
        last = _last_page_len(data)
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            _flashinfer_workspace(data.q.device), "NHD", backend=backend
        )

        def plan() -> None:
            wrapper.plan(
                data.qo_indptr,
                indptr,
                indices,
                last,
                case.q_heads,
                case.kv_heads,
                case.head_dim,
                case.page_size,
                causal=True,
                q_data_type=data.q.dtype,
                kv_data_type=data.k.dtype,
            )

        plan()
        return Prepared(plan, lambda: wrapper.run(data.q, (data.k, data.v), out=data.out))

    return prepare


def flashinfer_decode(data: Data) -> Prepared:
    import flashinfer

    case = data.case
    if max(case.q_lens) > 1:
        raise Unsupported("the decode wrapper takes one query token a request")
    indptr, indices = data.csr
    last = _last_page_len(data)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_flashinfer_workspace(data.q.device), "NHD")

    def plan() -> None:
        wrapper.plan(
            indptr,
            indices,
            last,
            case.q_heads,
            case.kv_heads,
            case.head_dim,
            case.page_size,
            q_data_type=data.q.dtype,
            kv_data_type=data.k.dtype,
        )

    plan()
    return Prepared(plan, lambda: wrapper.run(data.q, (data.k, data.v), out=data.out))


def flashinfer_persistent(data: Data) -> Prepared:
    import flashinfer

    case = data.case
    indptr, indices = data.csr
    wrapper = flashinfer.BatchAttention("NHD", str(data.q.device))

    def plan() -> None:
        wrapper.plan(
            data.qo_indptr,
            indptr,
            indices,
            data.kv_len,
            case.q_heads,
            case.kv_heads,
            case.head_dim,
            case.head_dim,
            case.page_size,
            causal=True,
            q_data_type=data.q.dtype,
            kv_data_type=data.k.dtype,
        )

    plan()
    return Prepared(plan, lambda: wrapper.run(data.q, (data.k, data.v), out=data.out)[0])


PEERS: dict[str, dict[str, Callable[[Data], Prepared]]] = {
    "fa3": {"fa3": fa3},
    "flashinfer": {
        "flashinfer_fa2": _flashinfer_prefill("fa2"),
        "flashinfer_fa3": _flashinfer_prefill("fa3"),
        "flashinfer_decode": flashinfer_decode,
        "flashinfer_persistent": flashinfer_persistent,
    },
}
EVERY_PEER = {name: prepare for family in PEERS.values() for name, prepare in family.items()}
