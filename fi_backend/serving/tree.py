"""Words of variants.TREE from what engines know of their token trees. Nothing waits for the device."""

from __future__ import annotations

import torch

from .refuse import refuse

MAX_TOKENS = 64  # bits of a word


def words_of_mask(mask: torch.Tensor, seq_lens: torch.Tensor, drafts: int) -> torch.Tensor:
    """mask: flat, bool or integers, [drafts, seq_len + drafts] of one request after the other.

    The keys before the drafts are visible to all. Requests past the mask's end are padding: their words mean
    nothing. Returns int64 [requests * drafts]. Refuses drafts other than 1 to 64.
    """
    if not 1 <= drafts <= MAX_TOKENS:
        refuse(f"expected a tree of 1 to {MAX_TOKENS} draft tokens, got {drafts}")
    mask = mask.flatten()
    row = torch.arange(drafts, device=mask.device)
    width = seq_lens.long() + drafts
    first = (width * drafts).cumsum(0) - width * drafts + seq_lens
    index = first[:, None, None] + row[:, None] * width[:, None, None] + row
    bits = mask[index.clamp(max=mask.numel() - 1)] != 0
    return (bits.long() << row).sum(-1).flatten()


def words_of_branches(
    requests: int, branches: int, slots: int, used: int, device: torch.device
) -> torch.Tensor:
    """Each request's keys end with `slots` slots of every branch; a branch sees the first `used` of its own.

    Its query tokens are the branches' last ones. Returns int64 [requests * branches * slots]: the words of a
    request's query tokens are the last of its words.
    """
    words = torch.zeros(requests, branches * slots, dtype=torch.int64, device=device)
    words[:, -branches:] = ((1 << used) - 1) << torch.arange(0, branches * slots, slots, device=device)
    return words.flatten()
