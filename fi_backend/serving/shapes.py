"""Plans of engines whose layers differ: by shape, for one forward at a time, made when a layer asks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..formats import BlockSparse
from ..plan import Plan, Planner
from .plans import made, workspace


class Shape(NamedTuple):
    """What a plan depends on besides the batch: fields of Planner."""

    q_heads: int
    kv_heads: int
    head_dim: int
    head_dim_vo: int
    window: int | None
    causal: bool


class Planners:
    """Planners of one forward at a time, made as they are asked for.

    Plans of different shapes or tables of one forward live side by side; the next forward overwrites them.
    max_kv_len: given, plans are batch invariant up to it. overlapping: forwards run beside those of other
    Planners, so the workspace is not shared.
    """

    def __init__(self, device: torch.device, *, max_kv_len: int | None, overlapping: bool) -> None:
        self._options: dict[str, Any] = {"device": device, "workspace": None if overlapping else workspace}
        if max_kv_len is not None:
            self._options |= {"batch_invariant": True, "max_kv_len": max_kv_len}
        self._made: dict[tuple[Shape, str], list[Planner]] = {}
        self.at_least = (1, 1)  # requests and tokens that every planner takes, so that graphs share one

    def plan(self, shape: Shape, table: str, batch: BlockSparse, tokens: int) -> Plan:
        """table: names the batch's lengths, which may differ between layers of equal shape."""
        made()
        return self._get((shape, table), batch.num_requests, tokens).plan(batch)

    def _get(self, key: tuple[Shape, str], requests: int, tokens: int) -> Planner:
        known = self._made.setdefault(key, [])
        for planner in known:
            if requests <= planner.max_requests and tokens <= planner.max_tokens:
                return planner
        # powers of two: few planners whatever the sizes of the batches to come
        options = {**self._options, **key[0]._asdict()}
        options["max_requests"] = _power_of_two(max(requests, self.at_least[0]))
        options["max_tokens"] = _power_of_two(max(tokens, self.at_least[1]))
        known.append(Planner(**options))
        return known[-1]


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


class Lengths(NamedTuple):
    """qo_indptr [requests + 1] and kv_len [requests] int32; longest: most query tokens of one, or more."""

    qo_indptr: torch.Tensor
    kv_len: torch.Tensor
    longest: int

    @classmethod
    def uniform(cls, kv_len: torch.Tensor, each: int) -> Lengths:
        """Every request has `each` query tokens."""
        end = kv_len.shape[0] * each + 1
        return cls(torch.arange(0, end, each, dtype=torch.int32, device=kv_len.device), kv_len, each)

    @classmethod
    def ragged(cls, kv_len: torch.Tensor, q_len: torch.Tensor, longest: int) -> Lengths:
        """q_len [requests], integers: query tokens of each request."""
        qo_indptr = torch.zeros(kv_len.shape[0] + 1, dtype=torch.int32, device=kv_len.device)
        torch.cumsum(q_len, 0, out=qo_indptr[1:])
        return cls(qo_indptr, kv_len, longest)


class Forward:
    """The plans of one forward. An adapter's subclass says what its engine's batch looks like."""

    def __init__(self, planners: Planners) -> None:
        self._planners = planners
        self.restart()

    def restart(self) -> None:
        """The next layer computes all anew: the warm-up and the capture of a graph are two forwards."""
        self._plans: dict[tuple[Shape, str], Plan] = {}
        self._lengths: Lengths | None = None

    def plan(self, shape: Shape, table: str, tokens: int) -> Plan:
        """tokens: query tokens of the calling layer. table: the adapter's name for whose keys it reads."""
        found = self._plans.get((shape, table))
        if found is None:
            if self._lengths is None:
                self._lengths = self.lengths(tokens)
            batch = self.batch_over(table, self._lengths, shape.window)
            found = self._plans[shape, table] = self._planners.plan(shape, table, batch, tokens)
        return found

    def lengths(self, tokens: int) -> Lengths:
        """Of the decoder's own keys."""
        raise NotImplementedError

    def batch_over(self, table: str, lengths: Lengths, window: int | None) -> BlockSparse:
        raise NotImplementedError
