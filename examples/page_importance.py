"""Decode steps that read each KV head's most important pages alone, as in Quest (Tang et al., 2024).

A page keeps the least and the largest value of every channel of its keys. For a query q,
sum_d max(q_d least_d, q_d largest_d) is then no less than any of the page's logits. The pages with the
largest such bounds are read, and the last one, which grows. Every KV head has its own: in a cache [pages,
kv_heads, page_size, head_dim] each (page, KV head) is a page of a cache with one KV head, and each (request,
KV head) a request of it. All on the device, in tensors of fixed shape: a CUDA graph can hold it.

`python examples/page_importance.py` compares it with reading everything, in time and result.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from fi_backend import BlockSparse, KVCache, Planner, run


class PageImportance:
    """Decode of up to max_requests over the `keep` most important pages of each KV head."""

    def __init__(
        self, k: torch.Tensor, v: torch.Tensor, *, q_heads: int, max_requests: int, keep: int
    ) -> None:
        """k, v [pages, kv_heads, page_size, head_dim], contiguous."""
        pages, self.kv_heads, self.page_size, head_dim = k.shape
        self.keep, self.group = keep, q_heads // self.kv_heads
        self.least = k.new_full((pages, self.kv_heads, head_dim), torch.inf)
        self.largest = -self.least
        self._k = k
        self._cache = KVCache.separate(k.flatten(0, 1)[:, None], v.flatten(0, 1)[:, None], "HND")
        rows = max_requests * self.kv_heads
        self.planner = Planner(
            q_heads=self.group,
            kv_heads=1,
            head_dim=head_dim,
            max_requests=rows,
            max_tokens=rows,
            device=k.device,
        )
        self._qo_indptr = torch.arange(rows + 1, dtype=torch.int32, device=k.device)

    def summarize(self, pages: torch.Tensor, tokens: torch.Tensor) -> None:
        """pages [n] int64 and how many tokens [n] they hold now: after these were written."""
        exists = torch.arange(self.page_size, device=pages.device) < tokens[:, None]
        keys, hidden = self._k[pages], ~exists[:, None, :, None]
        self.least[pages] = keys.masked_fill(hidden, torch.inf).amin(2)
        self.largest[pages] = keys.masked_fill(hidden, -torch.inf).amax(2)

    def bounds(self, q: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
        """q [R, q_heads, D], block_table [R, W] -> [R, kv_heads, W]: no logit of the page is larger.

        For the query head of the group that has the largest; unscaled.
        """
        table = block_table.long()
        heads = q.unflatten(1, (self.kv_heads, self.group)).float()
        least, largest = self.least[table].float(), self.largest[table].float()  # [R, W, kv_heads, D]
        above = torch.einsum("rhgd,rwhd->rhgw", heads.clamp(min=0), largest)
        return (above + torch.einsum("rhgd,rwhd->rhgw", heads.clamp(max=0), least)).amax(2)

    def choose(
        self, q: torch.Tensor, block_table: torch.Tensor, kv_len: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[R, kv_heads, keep] int32 pages, the request's last one last, and keys in them [R] int32."""
        last = ((kv_len + self.page_size - 1) // self.page_size - 1).clamp(min=0)
        places = torch.arange(block_table.shape[1], device=q.device)
        # the last page is read anyway, and behind it the table names none
        bounds = self.bounds(q, block_table).masked_fill((places >= last[:, None])[:, None], -torch.inf)
        most = min(self.keep, block_table.shape[1])
        before = last.clamp(max=most - 1)  # pages that are read besides the last
        shape = (-1, self.kv_heads, 1)
        best = bounds.topk(most, dim=2).indices
        best = best.scatter(
            2, before.long()[:, None, None].expand(shape), last.long()[:, None, None].expand(shape)
        )
        chosen = block_table[:, None].expand(-1, self.kv_heads, -1).gather(2, best)
        return chosen, (kv_len - (last - before) * self.page_size).int()

    def __call__(self, q: torch.Tensor, block_table: torch.Tensor, kv_len: torch.Tensor) -> torch.Tensor:
        """q [R, q_heads, D] of a token each, block_table [R, W], kv_len [R] int32 -> [R, q_heads, D]."""
        chosen, keys = self.choose(q, block_table, kv_len)
        heads = torch.arange(self.kv_heads, dtype=torch.int32, device=q.device)
        table = (chosen * self.kv_heads + heads[:, None]).flatten(0, 1)
        rows = len(table)
        batch = BlockSparse.from_block_table(
            self._qo_indptr[: rows + 1], keys.repeat_interleave(self.kv_heads), table, self.page_size
        )
        out = run(self.planner.plan(batch), q.reshape(rows, self.group, -1), self._cache)
        return out.view(q.shape)


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one of ten."""
    for wanted in (2, 10):
        start = time.perf_counter()
        for _ in range(wanted):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return 100 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--kv-len", type=int, default=8192, help="keys of each request")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q_heads, kv_heads, page_size, head_dim, requests = 32, 8, 16, 128, args.requests
    width = -(-args.kv_len // page_size)
    # keys of a page are alike, as those of neighbouring tokens are, and a query looks for a few pages
    centres = 1.5 * torch.randn(requests, width, kv_heads, head_dim, device=device, dtype=dtype)
    k = torch.randn(requests * width, kv_heads, page_size, head_dim, device=device, dtype=dtype) / 3
    k += centres.view(-1, kv_heads, 1, head_dim)
    v = torch.randn_like(k)
    wanted = torch.randint(width, (requests, 6, q_heads), device=device)
    row, kv_head = torch.arange(requests, device=device), torch.arange(q_heads, device=device)
    kv_head //= q_heads // kv_heads
    q = 0.35 * centres[row[:, None, None], wanted, kv_head].sum(1)
    table = torch.arange(requests * width, dtype=torch.int32, device=device).view(requests, width)
    kv_len = torch.full((requests,), args.kv_len, dtype=torch.int32, device=device)
    everything: torch.Tensor | None = None
    for percent in (100, 50, 25, 10):
        keep = max(1, width * percent // 100)
        attend = PageImportance(k, v, q_heads=q_heads, max_requests=requests, keep=keep)
        attend.summarize(table.flatten().long(), torch.full((table.numel(),), page_size, device=device))
        out = attend(q, table, kv_len)
        everything = out if everything is None else everything
        error = float((out - everything).norm() / everything.norm())
        ms = timed(partial(attend, q, table, kv_len), device)
        print(f"{percent:3} % of the pages: {ms:7.2f} ms a step with the choice, error {error:.3f}")


if __name__ == "__main__":
    main()
