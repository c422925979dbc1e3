"""The promise of batch invariant planners: a row has the same bits however its request is cut into steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import checks
import torch
from cases import Case, Inputs, make

from fi_backend import BlockSparse

CHUNK = 32 * 64  # kChunkTiles tiles in csrc/tiles.h
# a prompt; rows on both sides of the first chunk's end, and of the second's
PROMPT, ONE, TWO = Case((150,), (150,)), Case((130,), (CHUNK + 60,)), Case((170,), (2 * CHUNK + 90,))

SHAPES = [
    *(replace(c, q_heads=g, kv_heads=1, seed=g) for c in (PROMPT, ONE, TWO) for g in (1, 4, 8)),
    *(replace(c, q_heads=8, head_dim=128) for c in (PROMPT, TWO)),
    replace(TWO, page_size=1, dtype="f16"),
    replace(ONE, head_dim=80, page_size=1),
]
VARIANTS = [
    *(replace(TWO, variant="CAUSAL+WINDOW", window=w) for w in (1, 100, CHUNK + 5)),
    replace(ONE, variant="CAUSAL+WINDOW+SINKS", window=90),
    replace(TWO, variant="CAUSAL+SINKS"),
    replace(TWO, variant="CAUSAL+SIGMOID"),
    replace(TWO, variant="CAUSAL+WINDOW+SOFT_CAP+ALIBI+SINKS", window=CHUNK),
]
# at the ends of chunks, and beside them: against the oracle
ENDS = Case(
    (1, 40, 1, 1, 3, 130), (CHUNK, CHUNK + 20, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 2, 130), q_heads=8, seed=3
)


@dataclass(frozen=True)
class Step:
    """Query tokens [begin, end) of one request, each span as a request of this batch."""

    spans: tuple[tuple[int, int], ...]
    workers: int | None = None
    slack: int = 0  # how much longer the plan takes the keys to be


def cut(tokens: int, size: int) -> tuple[tuple[int, int], ...]:
    """[0, tokens) in spans of this size, the last ones first."""
    return tuple((i, min(i + size, tokens)) for i in reversed(range(0, tokens, size)))


def steps_of(tokens: int) -> Iterator[Step]:
    yield Step(cut(tokens, 1))  # every row a decode
    yield Step(cut(tokens, 1)[::7], workers=1, slack=200)
    yield Step(cut(tokens, 2), workers=5)
    yield Step(cut(tokens, 3), workers=64)
    yield Step(cut(tokens, 17), slack=70)
    yield Step(cut(tokens, 97) + cut(tokens, 1)[:9], workers=3)
    yield Step(((0, tokens), (tokens - 1, tokens), (0, tokens), (tokens // 2, tokens)), slack=1)


def run_step(
    inputs: Inputs, step: Step, batch_invariant: bool = True
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """out and lse of each span; without softmax there is no lse, and out stands in for it."""
    case, device = inputs.case, inputs.kv.device
    tokens, keys = case.q_lens[0], case.kv_lens[0]
    ends = itertools.accumulate((end - begin for begin, end in step.spans), initial=0)
    kv_len = torch.tensor([keys - tokens + end for _, end in step.spans], dtype=torch.int32, device=device)
    batch = BlockSparse.from_block_table(
        torch.tensor(list(ends), dtype=torch.int32, device=device),
        kv_len + step.slack,
        inputs.batch.table[:1].repeat(len(step.spans), 1),
        page_size=case.page_size,
    )
    q = torch.cat([inputs.q[begin:end] for begin, end in step.spans])
    part = replace(inputs, q=q, batch=batch, out=q.new_empty(*q.shape[:2], inputs.out.shape[2]))
    part.lse = inputs.lse.new_empty(q.shape[:2])
    planner = checks.planner_for(
        part,
        step.workers,
        max_requests=len(step.spans),
        max_tokens=len(q),
        max_kv_len=keys + step.slack,
        batch_invariant=batch_invariant,
    )
    plan = planner.plan(batch)
    batch.kv_len.copy_(kv_len)
    checks.poison(plan)
    out, lse = checks.run_inputs(plan, part, scale=0.5)  # logits of tens: no row is nearly uniform
    if not inputs.variant.softmax:
        lse = out
    sizes = [end - begin for begin, end in step.spans]
    return list(zip(out.split(sizes), lse.split(sizes), strict=True))


def check_rows(case: Case, device: str = "cpu", batch_invariant: bool = True) -> None:
    """The rows of a case's only request, as one prefill by one worker and in many other ways."""
    inputs = make(replace(case, extra_tokens=0), device)
    tokens = case.q_lens[0]
    [whole] = run_step(inputs, Step(((0, tokens),), workers=1), batch_invariant)
    assert not whole[0].isnan().any() and not whole[1].isnan().any()
    for step in steps_of(tokens):
        for (begin, end), part in zip(step.spans, run_step(inputs, step, batch_invariant), strict=True):
            for name, a, b in zip(("out", "lse"), whole, part, strict=True):
                differ = (a[begin:end] != b).flatten(1).any(1).nonzero().flatten() + begin
                assert not len(differ), f"{name} of tokens {differ.tolist()[:8]} in a step of {end - begin}"
