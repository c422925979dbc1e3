"""PrefixFinder: which requests begin with the same keys, read off their page tables or given by the user."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
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
        the current stream; this cannot be captured. Raises ValueError, and then leaves the tree as it was.
        """
        q_lens, kv_lens = np.diff(qo_indptr.numpy()), kv_len.numpy()
        given = sorted(((int(keys), sorted(requests)) for requests, keys in tree), key=lambda x: x[0])
        self._check(given, q_lens, kv_lens)
        path = self._nest(given, len(kv_lens))
        deepest = path.max(0)  # those with more keys come later
        order = np.lexsort(path[::-1])  # the requests of each prefix are neighbours
        order = order[deepest[order] >= 0]
        ends = np.cumsum(q_lens[order])
        tokens = int(q_lens[order].sum())
        if tokens > self.max_shared_tokens:
            raise ValueError(
                f"expected at most {self.max_shared_tokens} query tokens in prefixes (max_shared_tokens), "
                f"got {tokens}"
            )

        pinned = self._smxx is not None
        staged = torch.zeros(self.layout.totals, dtype=torch.uint8, pin_memory=pinned)
        header, prefixes, prefix_of, places = (x.numpy() for x in self._views(staged))
        prefix_of.fill(-1)
        prefix_of[: len(deepest)] = deepest
        first = np.zeros(len(deepest), np.int64)
        first[order] = ends - q_lens[order]
        places[:tokens, 1] = np.repeat(order, q_lens[order])
        offsets = qo_indptr.numpy()[order] - first[order]
        places[:tokens, 0] = np.arange(tokens) + np.repeat(offsets, q_lens[order])
        saved = 0
        for i, (keys, members) in enumerate(given):
            depth = int(np.argmax(path[:, members[0]] == i))
            parent = int(path[depth - 1, members[0]]) if depth else -1
            begin = given[parent][0] if depth else 0
            saved += (len(members) - 1) * (keys - begin)
            prefixes[i, :4] = first[members].min(), q_lens[members].sum(), begin, keys
            prefixes[i, 4:] = members[0], len(members), parent, depth
        header[:2] = len(given), tokens
        header[2:].view(np.int64)[0] = saved
        self._buffer[: len(staged)].copy_(staged, non_blocking=pinned)

    def _check(self, given: list[tuple[int, list[int]]], q_lens: np.ndarray, kv_lens: np.ndarray) -> None:
        if len(q_lens) != len(kv_lens):
            raise ValueError(f"expected qo_indptr of {len(kv_lens) + 1} entries, got {len(q_lens) + 1}")
        for what, count in (("requests", len(kv_lens)), ("prefixes", len(given))):
            if count > self.max_requests:
                raise ValueError(f"expected at most {self.max_requests} {what} (max_requests), got {count}")
        for keys, members in given:
            what = f"a prefix of {keys} keys for requests {members}"
            if not members or members[0] < 0 or members[-1] >= len(kv_lens):
                raise ValueError(f"expected requests from 0 to {len(kv_lens) - 1}, got {what}")
            if len(set(members)) < len(members):
                raise ValueError(f"expected each request once, got {what}")
            if keys < 1 or keys % self.tile_kv:
                raise ValueError(f"expected a multiple of {self.tile_kv} keys (tile_kv), got {what}")
            for r in members:
                if q_lens[r] < 1 or keys > kv_lens[r] - q_lens[r]:
                    raise ValueError(
                        f"expected keys before the query tokens of each request, got {what}, of which {r} "
                        f"has {kv_lens[r]} keys and {q_lens[r]} query tokens"
                    )

    def _nest(self, given: list[tuple[int, list[int]]], requests: int) -> np.ndarray:
        """[max_depth, requests] the prefixes of each request from the outermost on, -1: no more."""
        path = np.full((self.max_depth, requests), -1, np.int32)
        for i, (keys, members) in enumerate(given):
            what = f"{keys} keys for requests {members}"
            parents = np.unique(path[:, members].max(0))
            if len(parents) > 1 or (parents[0] >= 0 and given[parents[0]][0] == keys):
                others = ", ".join(f"{given[p][0]} for {given[p][1]}" for p in parents if p >= 0)
                raise ValueError(f"expected prefixes that nest, got {what} beside {others}")
            depth = int((path[:, members[0]] >= 0).sum())
            if depth == self.max_depth:
                raise ValueError(f"expected at most {depth} prefixes above one another, got one more: {what}")
            path[depth, members] = i
        return path
