"""PrefixFinder: which requests begin with the same keys, read off their page tables or given by the user."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from . import jit
from .formats import BlockSparse

_PREFIX_INTS = 8  # Prefix in csrc/params.h
_HEADER_INTS = 4  # PrefixHeader


class _Layout(NamedTuple):
    """Byte offsets of the finder's buffer: PrefixLayout in csrc/core/prefix.h."""

    prefixes: int
    prefix_of: int
    places: int
    totals: int
    saved_in_all: int
    tiles: int
    attached: int
    costs: int
    readers: int
    chains: int
    bytes: int


class PrefixFinder:
    """Owns the buffers of one tree of shared prefixes; every address and shape is fixed here.

    A prefix is keys that several requests begin with, a multiple of tile_kv of them, read once for all of
    these. A request shares none of the keys of its own query tokens, and nothing if it has more than
    max_shared_tokens // max_requests of them. max_depth: prefixes above one another, at most 7. always: every
    place where requests part makes a prefix, as far as max_depth allows; otherwise those that save memory
    traffic by the prices of csrc/cost.h, and none if all of them save too little.

    header [4] int32: prefixes, tokens, saved (int64: KV tokens of a head that are not read again).
    prefixes [max_requests, 8] int32: first, tokens, kv_begin, kv_end, request, requests, parent, depth.
    prefix_of [max_requests] int32: the deepest prefix of each request, -1: none.
    places [max_shared_tokens, 2] int32: query token and request.
    saved_in_all [1] int64: what `find` has saved so far, in all its calls and replays.

    Raises ValueError for numbers that make no sense, and for more than 1024 requests.
    """

    def __init__(
        self,
        *,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        head_dim_vo: int | None = None,
        tile_kv: int,
        max_requests: int,
        max_shared_tokens: int,
        max_kv_len: int,
        max_depth: int,
        always: bool = False,
        device: torch.device | str,
    ) -> None:
        import tvm_ffi

        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        if kv_heads < 1 or q_heads < 1 or q_heads % kv_heads:
            raise ValueError(f"expected q_heads a multiple of kv_heads, got {q_heads} and {kv_heads}")
        self.tile_kv, self.max_depth = tile_kv, max_depth
        self.max_requests, self.max_shared_tokens = max_requests, max_shared_tokens
        self._core: Any = jit.core()
        self._config = tvm_ffi.Shape(
            (
                q_heads // kv_heads,
                kv_heads,
                head_dim,
                head_dim if head_dim_vo is None else head_dim_vo,
                tile_kv,
                max_requests,
                max_shared_tokens,
                max_kv_len,
                max_depth,
                int(always),
            )
        )
        self.layout = _Layout(*self._core.prefix_layout(self._config))
        self._smxx = jit.smxx(jit.arch_of(self.device)) if self.device.type == "cuda" else None
        buffer = torch.zeros(self.layout.bytes + 63, dtype=torch.uint8, device=self.device)
        offset = -buffer.data_ptr() % 64
        self._buffer = buffer[offset : offset + self.layout.bytes]
        self.header, self.prefixes, self.prefix_of, self.places = self._views(self._buffer)
        self.prefix_of.fill_(-1)
        at = self.layout.saved_in_all
        self.saved_in_all = self._buffer[at : at + 8].view(torch.int64)

    def _views(self, buffer: torch.Tensor) -> tuple[torch.Tensor, ...]:
        def view(offset: int, *shape: int) -> torch.Tensor:
            return buffer[offset : offset + math.prod(shape) * 4].view(torch.int32).view(shape)

        layout = self.layout
        return (
            view(0, _HEADER_INTS),
            view(layout.prefixes, self.max_requests, _PREFIX_INTS),
            view(layout.prefix_of, self.max_requests),
            view(layout.places, self.max_shared_tokens, 2),
        )

    @property
    def tree(self) -> tuple[int, int, int, int, int]:
        """As planners take it: max_shared_tokens, addresses of header, prefixes, prefix_of and places."""
        parts = (self.header, self.prefixes, self.prefix_of, self.places)
        header, prefixes, prefix_of, places = (x.data_ptr() for x in parts)
        return self.max_shared_tokens, header, prefixes, prefix_of, places

    def clear(self) -> None:
        """Empties the tree: nothing is shared. On a GPU on the current stream, and capturable."""
        self.header.zero_()
        self.prefix_of.fill_(-1)

    def find(self, batch: BlockSparse) -> None:
        """Fills the tree with what the batch's page tables share, entries compared as they are stored.

        On a GPU without synchronising, on the current stream, and capturable. Lengths must be exact: a prefix
        ends before the query tokens. Keys beyond max_kv_len are not looked at. Raises ValueError or TypeError
        for a batch of the wrong device or dtype, or of more than max_requests requests.
        """
        smxx = self._smxx
        if smxx is not None and torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self.find(batch)
        self._core.find_prefixes(
            self._config,
            self._buffer,
            batch.qo_indptr,
            batch.kv_len,
            batch.table,
            batch.starts,
            batch.start_stride,
            batch.entry_step,
            batch.page_size,
            smxx.find_prefixes if smxx else 0,
            smxx.error if smxx else 0,
        )
        return None

    def set(
        self, tree: Iterable[tuple[Sequence[int], int]], qo_indptr: torch.Tensor, kv_len: torch.Tensor
    ) -> None:
        """Fills the tree with prefixes given as (requests, keys that they all begin with).

        Prefixes nest or have no request in common; one within another has more keys than that. qo_indptr
        [R + 1] and kv_len [R] int32 on the CPU: lengths of the batch. On a GPU the tree is copied there on
        the current stream; this cannot be captured. Raises ValueError or TypeError, and then leaves the tree
        as it was.
        """
        import tvm_ffi

        if self._smxx is not None and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("expected no tree to be set while a graph is captured")
        given = [(list(requests), keys) for requests, keys in tree]
        ends = itertools.accumulate(len(requests) for requests, _ in given)
        numbers = [keys for _, keys in given], ends, itertools.chain.from_iterable(r for r, _ in given)
        shapes = (tvm_ffi.Shape(tuple(x)) for x in numbers)
        if self._smxx is None:
            self._core.set_prefixes(self._config, self._buffer, qo_indptr, kv_len, *shapes)
            return
        staged = torch.empty(
            self.layout.totals, dtype=torch.uint8, pin_memory=True
        )  # kept until it is copied
        self._core.set_prefixes(self._config, staged, qo_indptr, kv_len, *shapes)
        self._buffer[: len(staged)].copy_(staged, non_blocking=True)
