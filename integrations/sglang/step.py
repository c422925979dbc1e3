"""What the layers of one forward share: lengths, page tables and plans, all on the device.

Nothing is computed until the first layer asks. A graph that is being captured thus records all of it, and
each replay plans anew from the engine's static buffers without any host work.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fi_backend import BlockSparse, Plan
from fi_backend.serving.shapes import Planners, Shape, windowed_token_table
from fi_backend.serving.tree import words_of_branches

SELF, SWA, CROSS = "self", "swa", "cross"  # whose keys, and in which pool


class Draft(NamedTuple):
    """Decode step `step` of `steps` of a draft model: topk branches a request, each with `steps` slots."""

    step: int
    steps: int
    topk: int


class Lengths(NamedTuple):
    qo_indptr: torch.Tensor  # [requests + 1] int32
    kv_len: torch.Tensor  # [requests] int32
    longest: int  # most query tokens of a request, or an upper bound


class Step:
    """One forward of `batch`: a ForwardBatch, or the view of one that a graph replay hands over.

    uniform: in a graph every request has equally many query tokens.
    """

    def __init__(self, backend: Any, batch: Any, *, uniform: bool, draft: Draft | None) -> None:
        self.batch = batch
        self.tree_mask: torch.Tensor | None = None  # words of variants.TREE
        self._planners: Planners = backend.planners
        self._table: torch.Tensor = backend.req_to_token_pool.req_to_token
        self._full_to_swa: Any = getattr(backend.token_to_kv_pool, "full_to_swa_index_mapping", None)
        self._page_size: int = backend.page_size
        self._uniform, self._draft = uniform, draft
        self.restart()

    def restart(self) -> None:
        """The next layer computes all anew: the warm-up and the capture of a graph are two forwards."""
        self._plans: dict[tuple[Shape, str], Plan] = {}
        self._lengths: Lengths | None = None
        self._swa_loc: torch.Tensor | None = None

    def plan(self, shape: Shape, table: str, tokens: int) -> Plan:
        """tokens: query tokens of the calling layer."""
        found = self._plans.get((shape, table))
        if found is None:
            if self._lengths is None:
                self._lengths = self._find_lengths(tokens)
            batch = self._block_sparse(self._lengths, table, shape.window)
            found = self._plans[shape, table] = self._planners.plan(shape, table, batch, tokens)
        return found

    def swa_loc(self, loc: torch.Tensor) -> torch.Tensor | None:
        """Where the new tokens go in the pool of windowed layers, if there is one."""
        if self._swa_loc is None and self._full_to_swa is not None:
            self._swa_loc = self._full_to_swa[loc]
        return self._swa_loc

    def _find_lengths(self, tokens: int) -> Lengths:
        b, mode = self.batch, self.batch.forward_mode
        requests, each = b.batch_size, 1
        kv_len = b.seq_lens[:requests].int()
        if self._draft is not None:
            step, steps, each = self._draft
            kv_len = kv_len + (step + 1 if each == 1 else each * steps)
            if each > 1:
                self.tree_mask = words_of_branches(requests, each, steps, step + 1, kv_len.device)
        elif mode.is_target_verify():
            each = b.spec_info.draft_token_num
            kv_len = kv_len + each  # the engine's length counts no drafts here
        elif not mode.is_decode_or_idle():
            new: Any = getattr(b, "extend_seq_lens", None)
            if new is None:
                new = getattr(b.spec_info, "extend_seq_lens_tensor", None)
            if not self._uniform:
                qo_indptr = torch.zeros(requests + 1, dtype=torch.int32, device=kv_len.device)
                torch.cumsum(new[:requests], 0, out=qo_indptr[1:])
                return Lengths(qo_indptr, kv_len, max(b.extend_seq_lens_cpu or [tokens]))
            each = tokens // requests
            if new is not None:  # rows past a request's own are padding behind its last key
                kv_len = kv_len - new[:requests].int() + each
        qo_indptr = torch.arange(0, requests * each + 1, each, dtype=torch.int32, device=kv_len.device)
        return Lengths(qo_indptr, kv_len, each)

    def _block_sparse(self, lengths: Lengths, table: str, window: int | None) -> BlockSparse:
        qo_indptr, kv_len, longest = lengths
        rows = self.batch.req_pool_indices[: kv_len.shape[0]]
        if table == SWA:
            assert window is not None
            batch = BlockSparse.from_token_table(qo_indptr, kv_len, self._table, rows, self._page_size)
            return windowed_token_table(batch, window, longest, self._full_to_swa)
        encoder = getattr(self.batch, "encoder_lens", None)
        if encoder is None:
            return BlockSparse.from_token_table(qo_indptr, kv_len, self._table, rows, self._page_size)
        # a row holds the encoder's keys and behind them the decoder's, which begin at no page's border
        encoder = encoder[: rows.shape[0]].int()
        starts = rows.long() * self._table.stride(0)
        if table == CROSS:
            return BlockSparse(qo_indptr, encoder, self._table, starts, 1, 1, True, 1)
        return BlockSparse(qo_indptr, kv_len, self._table, starts + encoder, 1, 1, True, 1)
