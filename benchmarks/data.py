"""A case as tensors: queries, a paged cache with its pages in any order, and what the outputs must be."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fi_backend import eager

from .cases import Case
from .variants import with_arguments


@dataclass
class Data:
    """q, out [tokens, q_heads, D]; k, v [pages, page_size, kv_heads, D]; int32: block_table [R, W],
    qo_indptr [R + 1], kv_len [R]. All on the device. A shared prefix is the same pages in every row."""

    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    block_table: torch.Tensor
    qo_indptr: torch.Tensor
    kv_len: torch.Tensor

    @property
    def pages(self) -> torch.Tensor:
        """[R] int32: pages that each request uses."""
        size = self.case.page_size
        return (self.kv_len + size - 1) // size

    def csr(self, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """The block table from page `first` of each request on, as indptr [R + 1] and indices, int32."""
        columns = torch.arange(self.block_table.shape[1], device=self.kv_len.device)
        used = (columns >= first) & (columns < self.pages[:, None])
        return offsets(self.pages - first), self.block_table[used].contiguous()


def offsets(counts: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def make(case: Case, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Data:
    generator = torch.Generator(device).manual_seed(0)
    q_len = torch.tensor(case.q_lens, dtype=torch.int32)
    kv_len = torch.tensor(case.kv_lens, dtype=torch.int32)
    pages = (kv_len + case.page_size - 1) // case.page_size
    count, table = tables(case, pages)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

    cache = (count, case.page_size, case.kv_heads, case.head_dim)
    q = normal(case.tokens, case.q_heads, case.head_dim)
    k, v = normal(*cache), normal(*cache)
    indptr = offsets(q_len)
    return Data(case, q, k, v, torch.empty_like(q), table.to(device), indptr.to(device), kv_len.to(device))


def tables(case: Case, pages: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Pages of the cache; page ids of each request, which uses so many [R, W]."""
    rng = torch.Generator().manual_seed(0)
    table = torch.zeros(len(pages), int(pages.max()), dtype=torch.int32)
    if case.pool:
        count = case.pool // case.page_size
        for row, n in zip(table, pages.tolist(), strict=True):
            row[:n] = torch.randperm(count, generator=rng)[:n].sort().values
        return count, table
    shared = case.prefix // case.page_size
    groups = torch.tensor(case.groups or (len(pages),))
    count = shared * len(groups) + int((pages - shared).sum())
    order = torch.arange(count) if case.in_order else torch.randperm(count, generator=rng)
    order = order.to(torch.int32)
    of_groups = order[: shared * len(groups)].view(len(groups), shared)
    table[:, :shared] = of_groups.repeat_interleave(groups, 0)
    used = torch.arange(table.shape[1] - shared) < (pages - shared)[:, None]
    table[:, shared:][used] = order[shared * len(groups) :]
    return count, table


def relative_error(data: Data, out: torch.Tensor, rows: int = 64) -> float:
    """|out - reference| / |reference| over random (token, query head) rows; the reference is float64.

    Of a variant other than CAUSAL all heads of an eighth as many tokens: its functions may ask for the head.
    Where tokens see later ones, beside a token all that follow it: so it keeps its position.
    """
    case, ahead = data.case, "PREFIX" in data.case.variant
    one_head = ahead or case.variant == "CAUSAL"
    variant, arguments = with_arguments(case, data.q.device)
    rng = torch.Generator().manual_seed(1)
    error = norm = 0.0
    for _ in range(rows if one_head else rows // 8):
        r = int(torch.randint(len(case.q_lens), (), generator=rng))
        t = int(torch.randint(case.q_lens[r], (), generator=rng))
        head = int(torch.randint(case.q_heads, (), generator=rng))
        kv_head = head // (case.q_heads // case.kv_heads)
        heads, kv_heads = (slice(h, h + 1) if one_head else slice(None) for h in (head, kv_head))
        following = case.q_lens[r] - t - 1
        visible = case.kv_lens[r] - (0 if ahead or case.variant == "FULL" else following)
        used = data.block_table[r, : -(-visible // case.page_size)].long()
        k, v = (cache[:, :, kv_heads][used].flatten(0, 1)[:visible] for cache in (data.k, data.v))
        row = int(data.qo_indptr[r]) + t
        q, found = data.q[row : row + 1 + (following if ahead else 0), heads], out[row : row + 1, heads]
        scale = case.head_dim**-0.5
        wanted, _ = eager.attend(q, k, v, variant, arguments, scale, torch.float64, r)
        wanted = wanted[:1]
        error += float((found.double() - wanted).square().sum())
        norm += float(wanted.square().sum())
    return (error / norm) ** 0.5
