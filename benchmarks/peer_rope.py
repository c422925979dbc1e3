"""Rotation as a kernel of its own, compiled by torch, of all queries and keys before attention without it.

What a window that slides costs where attention cannot rotate.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fi_backend.rope import rope_turns, rotated

from . import peer_fa3
from .data import Data
from .implementations import Prepare, Prepared, Unsupported, fi


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, out: torch.Tensor) -> None:
    """x, out [N, heads, D]; float32: cosine [N, 1, 1, D / 2], sine [N, 1, 2, D / 2], minus first."""
    halves = x.unflatten(-1, (2, -1)).float()
    out.copy_((halves * cosine + halves.flip(-2) * sine).flatten(-2))


def _tables(data: Data, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of positions [N], as _rotate takes them."""
    half = data.case.head_dim // 2
    one = torch.zeros(len(positions), 2 * half, dtype=torch.float64, device=positions.device)
    one[:, :half] = 1  # the rotated (1, 0) is (cosine, sine)
    turned = rotated(one, positions, rope_turns(2 * half, device=one.device)).float()
    cosine, sine = turned[:, None, None].chunk(2, -1)
    return cosine.contiguous(), torch.cat((-sine, sine), 2)


def _separate(prepare: Prepare) -> Prepare:
    def prepared(data: Data) -> Prepared:
        case = data.case
        if case.variant != "CAUSAL+ROPE" or set(case.q_lens) != {1}:
            raise Unsupported("decodes with rotation only")
        q, k = torch.empty_like(data.q), torch.empty_like(data.k)
        attention = prepare(replace(data, case=replace(case, variant="CAUSAL"), q=q, k=k))
        positions = torch.zeros(data.k.shape[:2], dtype=torch.int64, device=q.device)
        order = torch.arange(data.block_table.shape[1] * case.page_size, device=q.device)
        for row, pages in zip(data.block_table.long(), data.pages.tolist(), strict=True):
            positions[row[:pages]] = order[: pages * case.page_size].view(pages, -1)
        of_queries = data.q, *_tables(data, data.kv_len.long() - 1), q
        of_keys = data.k.flatten(0, 1), *_tables(data, positions.flatten()), k.flatten(0, 1)
        for x in (*of_queries, *of_keys):  # all but how many: the kernel divides by numbers it knows
            torch._dynamo.mark_static(x, list(range(1, x.dim())))
        rotate = torch.compile(_rotate, dynamic=True)

        def run() -> torch.Tensor:
            rotate(*of_queries)
            rotate(*of_keys)
            return attention.run()

        return Prepared(attention.plan, run)

    return prepared


PEERS: dict[str, Prepare] = {
    "separate": _separate(fi),
    "separate_fa3": _separate(peer_fa3.PEERS["fa3"]),
}
