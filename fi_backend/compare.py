"""Does a variant compute what its eager form says? Random cases, and the first difference by name."""

from __future__ import annotations

import random
from typing import Any

import torch

from . import eager
from .formats import BlockSparse, KVCache
from .plan import Planner
from .run import run
from .variants import CAUSAL, Variant

REQUESTS = 5
PAGE_SIZE, MAX_ROWS, MAX_KEYS = 16, 40, 200
# beyond twice the error of torch in the same precision: where that happens to be exact, we need not be
ATOL = {torch.bfloat16: 1e-4, torch.float16: 2e-5, torch.float32: 2e-6}


def check(
    variant: Variant,
    *,
    q_heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype | None = None,
    skip: Variant | None = None,
    device: torch.device | str | None = None,
    cases: int = 8,
    seed: int = 0,
    **variant_args: Any,
) -> float:
    """Runs a variant on random batches of REQUESTS requests beside its eager form in float64.

    variant_args as for `run`: tensors on `device`, of q_heads elements per head, REQUESTS per request,
    REQUESTS * MAX_ROWS per token, [REQUESTS, MAX_KEYS] per key.
    skip: as for Planner; without it plans leave out what CAUSAL and WINDOW hide.
    device: by default the GPU if there is one; dtype: by default bfloat16 there and float32 on the CPU.

    Returns the largest error of out. Raises AssertionError at the first element of out or lse that is further
    off than twice the largest error of torch in the same dtype, with its indices; and what `run` raises.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    planner = Planner(
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_requests=REQUESTS,
        max_tokens=REQUESTS * MAX_ROWS,
        max_kv_len=MAX_KEYS,
        causal=None if skip is not None else CAUSAL in variant,
        window=None if skip is not None else variant_args.get("window"),
        skip=skip,
        device=device,
    )
    of_skip = {} if skip is None else {a.name: variant_args[a.name] for a in skip.args}
    rng, worst = random.Random(seed), 0.0
    noise = torch.Generator().manual_seed(seed)
    for _ in range(cases):
        q_lens = [rng.choice((0, 1, 1, rng.randint(2, MAX_ROWS))) for _ in range(REQUESTS)]
        kv_lens = [rng.randint(n, MAX_KEYS) for n in q_lens]
        batch, pages = _batch(q_lens, kv_lens, rng, device)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=noise).to(device, dtype)

        kv = KVCache(*(normal(pages, PAGE_SIZE, kv_heads, head_dim) for _ in "kv"))
        q = normal(max(sum(q_lens), 1), q_heads, head_dim)
        lse = torch.empty(len(q), q_heads, device=device) if variant.softmax else None
        out = run(planner.plan(batch, **of_skip), q, kv, variant=variant, lse=lse, **variant_args)
        ask = (q, kv, batch, variant, variant_args, head_dim**-0.5)
        (true_out, true_lse), (fair, fair_lse) = eager.attention(*ask), eager.attention(*ask, dtype=dtype)
        n = sum(q_lens)
        off = (out[:n].double() - true_out).abs()
        limit = 2 * float((fair.to(dtype) - true_out).abs().max() if n else 0) + ATOL[dtype]
        where = f"variant {variant}, q_lens {q_lens}, kv_lens {kv_lens}"
        _complain(~(off <= limit), out, true_out, q_lens, kv_lens, f"{where}: out", limit)
        if lse is not None:
            limit = lse_limit(variant, fair_lse, true_lse)
            same = torch.isclose(lse[:n].double(), true_lse, rtol=1e-5, atol=limit)
            _complain(~same, lse, true_lse, q_lens, kv_lens, f"{where}: lse", limit)
        worst = max(worst, float(off.max()) if n else 0.0)
    return worst


def lse_limit(variant: Variant, fair: torch.Tensor, true: torch.Tensor) -> float:
    """How far an LSE may be off beside float64's; fair: torch's in the same precision."""
    seen = true.isfinite()
    return 1e-4 + (2 * float((fair - true)[seen].abs().max()) if variant.rounds and seen.any() else 0.0)


def _batch(
    q_lens: list[int], kv_lens: list[int], rng: random.Random, device: torch.device
) -> tuple[BlockSparse, int]:
    """Pages in random order, and how many there are."""
    need = [-(-n // PAGE_SIZE) for n in kv_lens]
    order = iter(rng.sample(range(sum(need)), sum(need)))
    table = torch.zeros(len(need), max(*need, 1), dtype=torch.int32)
    for row, count in zip(table, need, strict=True):
        row[:count] = torch.tensor([next(order) for _ in range(count)], dtype=torch.int32)
    qo_indptr = torch.tensor([0, *q_lens]).cumsum(0).to(device, torch.int32)
    lens = torch.tensor(kv_lens, dtype=torch.int32, device=device)
    return BlockSparse.from_block_table(qo_indptr, lens, table.to(device), PAGE_SIZE), max(sum(need), 1)


def _complain(
    wrong: torch.Tensor,
    got: torch.Tensor,
    wanted: torch.Tensor,
    q_lens: list[int],
    kv_lens: list[int],
    where: str,
    limit: float,
) -> None:
    if not wrong.any():
        return
    first = wrong.nonzero()[0].tolist()
    token, request = first[0], 0
    while token >= q_lens[request]:
        token -= q_lens[request]
        request += 1
    position = kv_lens[request] - q_lens[request] + token
    place = f"request {request}, q_pos {position}, q_head {first[1]}"
    place += "".join(f", column {c}" for c in first[2:])
    found, right = got[tuple(first)], wanted[tuple(first)]
    raise AssertionError(
        f"{where}: expected {right:.6g} within {limit:.2g} at {place}, got {found:.6g} "
        f"({int(wrong.sum())} of {wrong.numel()} elements differ)"
    )
