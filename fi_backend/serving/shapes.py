"""Plans of engines whose layers differ: by shape, for one forward at a time, made when a layer asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..formats import BlockSparse
from ..plan import Plan, Planner
from . import kernels, plans, saved
from .sharing import Sharing

if TYPE_CHECKING:
    from .layer import AttentionLayer


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
    batch_invariant: plans are, up to sharing.max_kv_len. overlapping: forwards run beside those of other
    Planners, so the workspace is not shared.
    """

    def __init__(
        self, device: torch.device, sharing: Sharing, *, batch_invariant: bool, overlapping: bool
    ) -> None:
        self._options: dict[str, Any] = {
            "device": device,
            "workspace": None if overlapping else plans.workspace,
        }
        if batch_invariant:
            self._options |= {"batch_invariant": True, "max_kv_len": sharing.max_kv_len}
        self._sharing = sharing
        self._layers: Counter[Shape] = Counter()
        self._element_bytes = 0
        self._made: dict[tuple[Shape, str], list[Planner]] = {}
        self.at_least = (1, 1)  # requests and tokens that every planner takes, so that graphs share one

    def serve(self, layers: Iterable[AttentionLayer]) -> None:
        """Layers of the model: their kernels are loaded now. Raises what Sharing.check does."""
        for layer in layers:
            self._layers[layer.shape] += 1
            self._element_bytes = layer.dtype.itemsize
        for shape in self._layers:
            self._sharing.check({**shape._asdict(), **self._options})
        if self._layers:
            kernels.load()

    def plan(self, shape: Shape, table: str, batch: BlockSparse, tokens: int) -> Plan:
        """table: names the batch's lengths, which may differ between layers of equal shape."""
        return plans.plan(self._get((shape, table), batch.num_requests, tokens), batch)

    def _get(self, key: tuple[Shape, str], requests: int, tokens: int) -> Planner:
        known = self._made.setdefault(key, [])
        for planner in known:
            if requests <= planner.max_requests and tokens <= planner.max_tokens:
                return planner
        # powers of two: few planners whatever the sizes of the batches to come
        options = {**self._options, **key[0]._asdict()}
        options["max_requests"] = _power_of_two(max(requests, self.at_least[0]))
        options["max_tokens"] = _power_of_two(max(tokens, self.at_least[1]))
        planner = Planner(**options, **self._sharing.options(options))
        saved.watch(planner, self._layers[key[0]], self._element_bytes)
        known.append(planner)
        return planner


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
        saved.look()
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
