"""What is measured: Data turned into what an engine does once a step and once a layer. Here ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import fi_backend
from fi_backend.variants import CAUSAL

from .cases import Case
from .data import Data
from .variants import with_arguments


class Unsupported(Exception):
    """The implementation does not take the case; the text says why."""


@dataclass(frozen=True)
class Prepared:
    plan: Callable[[], object]  # once per step
    run: Callable[[], torch.Tensor]  # once per layer; returns out [tokens, q_heads, D]; needs a plan
    list_tiles: Callable[[], object] | None = None  # of plans that skip: the first part of plan

    def plan_and_run(self) -> torch.Tensor:
        self.plan()
        return self.run()


Prepare = Callable[[Data], Prepared]


def refuse_variants(case: Case) -> None:
    """Of a peer that is measured with plain causal attention alone. Raises Unsupported."""
    if case.variant != "CAUSAL":
        raise Unsupported(f"{case.variant} is not measured with it")


def fi(data: Data) -> Prepared:
    """With a prefix as engines run it: found anew in every plan, shared where that pays."""
    return _fi(data, levels=3 if data.case.prefix else 1)


def fi_flat(data: Data) -> Prepared:
    """Our single format."""
    if not data.case.prefix:
        raise Unsupported("no prefix is shared")
    return _fi(data, levels=1)


def _fi(data: Data, levels: int) -> Prepared:
    case = data.case
    variant, arguments = with_arguments(case, data.q.device)
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
        causal=None if case.skip else CAUSAL in variant,
        window=None if case.skip else arguments.get("window"),
        skip=variant if case.skip else None,
        levels=levels,
        device=data.q.device,
    )
    planned = fi_backend.Composable(batch) if levels > 1 else batch
    kv = fi_backend.KVCache.separate(data.k, data.v, "NHD")
    of_skip = arguments if case.skip else {}
    plan = planner.plan(planned, **of_skip)
    return Prepared(
        lambda: planner.plan(planned, **of_skip),
        lambda: fi_backend.run(plan, data.q, kv, data.out, variant=variant, **arguments),
        (lambda: planner.list_tiles(batch, "device", of_skip)) if case.skip else None,
    )


OURS: dict[str, Prepare] = {"fi": fi, "fi_flat": fi_flat}
