"""Token tables as engines keep them for more than one kind of key: a windowed pool, an encoder's keys."""

from __future__ import annotations

import torch

from ..formats import BlockSparse
from .shapes import Lengths


def behind_encoder(
    lengths: Lengths, req_to_token: torch.Tensor, rows: torch.Tensor, encoder_lens: torch.Tensor, cross: bool
) -> BlockSparse:
    """req_to_token [P, L] int32 slots, read in place; rows [R]: the row of each request.

    A row holds encoder_lens [R] keys of the encoder (cross: these are seen) and behind them the decoder's,
    which begin at no page's border.
    """
    starts, encoder = rows.long() * req_to_token.stride(0), encoder_lens.int()
    if cross:
        return BlockSparse(lengths.qo_indptr, encoder, req_to_token, starts, 1, 1, True, 1)
    return BlockSparse(lengths.qo_indptr, lengths.kv_len, req_to_token, starts + encoder, 1, 1, True, 1)


def windowed_pool(
    lengths: Lengths,
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    page_size: int,
    window: int,
    slot_map: torch.Tensor,
) -> BlockSparse:
    """For windowed layers with a cache of their own, whose slot of a token is slot_map [slots] int64.

    Only the pages that the window reaches are copied, through slot_map; lengths.longest fixes the shape of
    the copy. Entries before the window do not exist; they are never read.
    """
    qo_indptr, kv_len, longest = lengths
    first_page = (kv_len - qo_indptr.diff() - window + 1).clamp(min=0) // page_size
    width = min((window + longest) // page_size + 2, -(-req_to_token.shape[1] // page_size))
    pages = first_page[:, None] + torch.arange(width, dtype=torch.int32, device=kv_len.device)
    slots = req_to_token[rows[:, None], (pages * page_size).clamp(max=req_to_token.shape[1] - 1)]
    entries = slot_map[slots].int().flatten()
    starts = torch.arange(0, rows.shape[0] * width, width, device=kv_len.device) - first_page
    return BlockSparse(qo_indptr, kv_len, entries, starts, 1, 1, True, page_size)
