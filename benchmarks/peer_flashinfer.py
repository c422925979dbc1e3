"""FlashInfer's wrappers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from .data import Data
from .implementations import Prepare, Prepared, Unsupported, refuse_variants

# of others some wrappers do not compile and one ends the process with an illegal instruction (0.6.14)
HEAD_DIMS = (64, 128, 256)


@cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(512 << 20, dtype=torch.uint8, device=device)  # zero: a demand of the decode wrapper


def _last_page_len(data: Data) -> torch.Tensor:
    return (data.kv_len - 1) % data.case.page_size + 1


def _prepared(
    data: Data,
    wrapper: Any,
    tables: tuple[Any, ...],
    run: Callable[[], torch.Tensor],
    head_dims: int = 1,
    **causal: bool,
) -> Prepared:
    """tables: what the wrapper's plan takes before the heads. head_dims: how often it takes the head dim."""
    case = data.case
    refuse_variants(case)
    if case.head_dim not in HEAD_DIMS:
        raise Unsupported(f"expected a head dim among {HEAD_DIMS}, got {case.head_dim}")
    shape = (case.q_heads, case.kv_heads, *(case.head_dim,) * head_dims, case.page_size)

    def plan() -> None:
        wrapper.plan(*tables, *shape, q_data_type=data.q.dtype, kv_data_type=data.k.dtype, **causal)

    plan()
    return Prepared(plan, run)


def _prefill(backend: str) -> Prepare:
    def prepare(data: Data) -> Prepared:
        import flashinfer

        workspace = _workspace(data.q.device)
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
        tables = (data.qo_indptr, *data.csr(), _last_page_len(data))
        return _prepared(
            data, wrapper, tables, lambda: wrapper.run(data.q, (data.k, data.v), out=data.out), causal=True
        )

    return prepare


def _decode(data: Data) -> Prepared:
    import flashinfer

    if max(data.case.q_lens) > 1:
        raise Unsupported("the decode wrapper takes one query token a request")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(data.q.device), "NHD")
    tables = (*data.csr(), _last_page_len(data))
    return _prepared(data, wrapper, tables, lambda: wrapper.run(data.q, (data.k, data.v), out=data.out))


def _persistent(data: Data) -> Prepared:
    import flashinfer

    wrapper = flashinfer.BatchAttention("NHD", str(data.q.device))
    tables = (data.qo_indptr, *data.csr(), data.kv_len)
    return _prepared(
        data,
        wrapper,
        tables,
        lambda: wrapper.run(data.q, (data.k, data.v), out=data.out)[0],
        head_dims=2,  # of K and of V
        causal=True,
    )


def _cascade(data: Data) -> Prepared:
    """The prefixes of all groups and the rest as two levels, and a merge."""
    import flashinfer

    case, device = data.case, data.q.device
    if not case.prefix:
        raise Unsupported("no prefix is shared")
    shared = case.prefix // case.page_size
    indptr, indices = data.csr(shared)

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    groups = case.groups or (len(case.q_lens),)
    ends = list(itertools.accumulate(groups, initial=0))
    levels = (
        [data.qo_indptr[ends], data.qo_indptr],
        [ints(*range(0, shared * len(ends), shared)), indptr],
        [data.block_table[ends[:-1], :shared].flatten(), indices],
        [ints(*(case.page_size for _ in groups)), _last_page_len(data)],
    )
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, _workspace(device), "NHD")
    return _prepared(data, wrapper, levels, lambda: wrapper.run(data.q, (data.k, data.v)), causal=True)


WRAPPERS: dict[str, Prepare] = {
    "flashinfer_fa2": _prefill("fa2"),
    "flashinfer_fa3": _prefill("fa3"),
    "flashinfer_decode": _decode,
    "flashinfer_persistent": _persistent,
    "flashinfer_cascade": _cascade,
}
