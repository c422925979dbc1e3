"""Planners by shape: for engines whose layers differ, and whose batches have no one capacity."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..formats import BlockSparse
from ..plan import Plan, Planner
from .plans import made


class Shape(NamedTuple):
    """What a plan depends on besides the batch: fields of Planner."""

    q_heads: int
    kv_heads: int
    head_dim: int
    head_dim_vo: int
    window: int | None
    causal: bool


class Planners:
    """Planners of one forward at a time, made as they are asked for; `options` are further ones of Planner.

    Plans of different shapes or tables of one forward live side by side; the next forward overwrites them.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
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


def windowed_token_table(
    batch: BlockSparse, window: int, longest: int, slot_map: torch.Tensor
) -> BlockSparse:
    """A batch over a token table, of which only the pages that a window reaches are copied, through slot_map.

    For windowed layers with a cache of their own: slot_map [slots] int64 gives that cache's slot of a token.
    longest: most query tokens of a request, or an upper bound, which fixes the shape of the copy. Entries
    before the window do not exist; they are never read.
    """
    table, page_size, device = batch.table, batch.page_size, batch.device
    assert batch.starts is not None
    first_page = (batch.kv_len - batch.qo_indptr.diff() - window + 1).clamp(min=0) // page_size
    width = min((window + longest) // page_size + 2, -(-table.shape[1] // page_size))
    pages = first_page[:, None] + torch.arange(width, dtype=torch.int32, device=device)
    slots = table[batch.starts[:, None], (pages * page_size).clamp(max=table.shape[1] - 1)]
    entries = slot_map[slots].int().flatten()
    starts = torch.arange(0, batch.num_requests * width, width, device=device) - first_page
    return BlockSparse(batch.qo_indptr, batch.kv_len, entries, starts, 1, 1, True, page_size)
