"""FlashInfer's wrappers."""

from __future__ import annotations

from functools import cache

import torch

from .data import Data
from .implementations import Prepare, Prepared, Unsupported


@cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(512 << 20, dtype=torch.uint8, device=device)  # zero: a demand of the decode wrapper


def _last_page_len(data: Data) -> torch.Tensor:
    return (data.kv_len - 1) % data.case.page_size + 1


def _prefill(backend: str) -> Prepare:
    def prepare(data: Data) -> Prepared:
        import flashinfer

        case = data.case
        indptr, indices = data.csr()
        last = _last_page_len(data)
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            _workspace(data.q.device), "NHD", backend=backend
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


def _decode(data: Data) -> Prepared:
    import flashinfer

    case = data.case
    if max(case.q_lens) > 1:
        raise Unsupported("the decode wrapper takes one query token a request")
    indptr, indices = data.csr()
    last = _last_page_len(data)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(data.q.device), "NHD")

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


def _persistent(data: Data) -> Prepared:
    import flashinfer

    case = data.case
    indptr, indices = data.csr()
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


def _cascade(data: Data) -> Prepared:
    """The shared prefix and the rest as two levels, and a merge."""
    import flashinfer

    case, device = data.case, data.q.device
    if not case.prefix:
        raise Unsupported("no prefix is shared")
    shared = case.prefix // case.page_size
    indptr, indices = data.csr(shared)

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    levels = (
        [ints(0, case.tokens), data.qo_indptr],
        [ints(0, shared), indptr],
        [data.block_table[0, :shared], indices],
        [ints(case.page_size), _last_page_len(data)],
    )
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, _workspace(device), "NHD")

    def plan() -> None:
        wrapper.plan(
            *levels,
            case.q_heads,
            case.kv_heads,
            case.head_dim,
            case.page_size,
            causal=True,
            q_data_type=data.q.dtype,
            kv_data_type=data.k.dtype,
        )

    plan()
    return Prepared(plan, lambda: wrapper.run(data.q, (data.k, data.v)))


WRAPPERS: dict[str, Prepare] = {
    "flashinfer_fa2": _prefill("fa2"),
    "flashinfer_fa3": _prefill("fa3"),
    "flashinfer_decode": _decode,
    "flashinfer_persistent": _persistent,
    "flashinfer_cascade": _cascade,
}
