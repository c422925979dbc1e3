"""What the layers of one forward share, all on the device, computed when the first layer asks.

A graph that is being captured thus records all of it, and each replay plans anew from the engine's static
buffers without any host work.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fi_backend import BlockSparse
from fi_backend.serving.shapes import Forward, Lengths
from fi_backend.serving.tables import behind_encoder, windowed_pool
from fi_backend.serving.tree import words_of_branches

SELF, SWA, CROSS = "self", "swa", "cross"  # whose keys, and in which pool


class Draft(NamedTuple):
    """Decode step `step` of `steps` of a draft model: topk branches a request, each with `steps` slots."""

    step: int
    steps: int
    topk: int


class Step(Forward):
    """One forward of `batch`: a ForwardBatch, or the view of one that a graph replay hands over.

    uniform: in a graph every request has equally many query tokens.
    """

    def __init__(self, backend: Any, batch: Any, *, uniform: bool, draft: Draft | None) -> None:
        self.batch = batch
        self.tree_mask: torch.Tensor | None = None  # words of variants.TREE
        self._backend, self._uniform, self._draft = backend, uniform, draft
        self._full_to_swa: Any = getattr(backend.token_to_kv_pool, "full_to_swa_index_mapping", None)
        super().__init__(backend.planners)

    def restart(self) -> None:
        super().restart()
        self._swa_loc: torch.Tensor | None = None

    def swa_loc(self, loc: torch.Tensor) -> torch.Tensor | None:
        """Where the new tokens go in the pool of windowed layers, if there is one."""
        if self._swa_loc is None and self._full_to_swa is not None:
            self._swa_loc = self._full_to_swa[loc]
        return self._swa_loc

    def lengths(self, tokens: int) -> Lengths:
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
                return Lengths.ragged(kv_len, new[:requests], max(b.extend_seq_lens_cpu or [tokens]))
            each = tokens // requests
            if new is not None:  # rows past a request's own are padding behind its last key
                kv_len = kv_len - new[:requests].int() + each
        return Lengths.uniform(kv_len, each)

    def batch_over(self, table: str, lengths: Lengths, window: int | None) -> BlockSparse:
        slots = self._backend.req_to_token_pool.req_to_token
        page_size, requests = self._backend.page_size, lengths.kv_len.shape[0]
        rows, encoder = self.batch.req_pool_indices[:requests], getattr(self.batch, "encoder_lens", None)
        if table == SWA:
            assert window
            return windowed_pool(lengths, slots, rows, page_size, window, self._full_to_swa)
        if encoder is not None:
            return behind_encoder(lengths, slots, rows, encoder[:requests], table == CROSS)
        return BlockSparse.from_token_table(*lengths[:2], slots, rows, page_size)
