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
    """x, out [.., heads, D], cosine and sine [.., 1, D / 2] float32."""
    first, second = x.float().chunk(2, -1)
    turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)
    out.copy_(turned.to(x.dtype))


def _tables(data: Data, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of [.., 1, D / 2] at positions [..]."""
    half = data.case.head_dim // 2
    one = torch.zeros(1, 2 * half, dtype=torch.float64, device=positions.device)
    one[:, :half] = 1  # the rotated (1, 0) is (cosine, sine)
    both = rotated(
        one.expand(positions.numel(), -1), positions.flatten(), rope_turns(2 * half, device=one.device)
    )
    cosine, sine = both.float().view(*positions.shape, 1, 2 * half).chunk(2, -1)
    return cosine.contiguous(), sine.contiguous()


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
        of_keys, of_queries = _tables(data, positions), _tables(data, data.kv_len.long() - 1)
        rotate = torch.compile(_rotate, dynamic=True)

        def run() -> torch.Tensor:
            rotate(data.q, *of_queries, q)
            rotate(data.k, *of_keys, k)
            return attention.run()

        return Prepared(attention.plan, run)

    return prepared


PEERS: dict[str, Prepare] = {
    "separate": _separate(fi),
    "separate_fa3": _separate(peer_fa3.PEERS["fa3"]),
}
