"""FlashInfer's wrappers, and building them side by side."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

from .cases import Case
from .data import Data, make
from .engine_process import ROOT, say
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


def build(names: list[str], cases: list[Case]) -> None:
    """Each wrapper and head dim is compiled at its first use, 30 to 70 s each: all side by side."""
    wanted = {(name, c.head_dim) for name in WRAPPERS if name in names for c in cases}
    if not any(c.prefix for c in cases):
        wanted = {job for job in wanted if job[0] != "flashinfer_cascade"}
    if not wanted:
        return
    say(f"building {len(wanted)} FlashInfer modules ...")
    start = time.monotonic()
    # ninja would start a compiler per core in each of them, at 2 to 4 GB a compiler
    jobs = max(1, 2 * (os.cpu_count() or 1) // len(wanted))
    environment = {"MAX_JOBS": str(jobs), **os.environ}

    def build_one(job: tuple[str, int]) -> None:
        code = f"from benchmarks.peer_flashinfer import first_use; first_use({job[0]!r}, {job[1]})"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        took = f"{time.monotonic() - start:.0f} s"
        failed = f"failed: {done.stderr.strip().splitlines()[-1:]}" if done.returncode else "built"
        say(f"  {job[0]} head dim {job[1]}: {failed} after {took}")

    with ThreadPoolExecutor(len(wanted)) as pool:
        list(pool.map(build_one, sorted(wanted)))


def first_use(name: str, head_dim: int) -> None:
    case = Case("first-use", "decode", (1,), (64,), head_dim=head_dim, prefix=32)
    WRAPPERS[name](make(case, torch.device("cuda"))).run()
