"""Batches as values, plans as arrays, and the promises of a plan as checks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from fi_backend.formats import BlockSparse
from fi_backend.plan import Plan, Planner, Tiles

WIDE, FIRST = 1, 2  # ItemFlag in csrc/params.h


@dataclass(frozen=True)
class Setup:
    """A planner and a batch. Tiles are small, so that a few hundred tokens have many."""

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    kv_heads: int = 1
    group: int = 1
    workers: int = 4
    q_wide: int = 8
    q_narrow: int = 4
    tile_kv: int = 4
    causal: bool = True
    window: int | None = None
    batch_invariant: bool = False
    room: int = 80
    max_requests: int | None = None  # None: as many as the batch has
    max_tokens: int | None = None
    max_kv_len: int | None = None

    @property
    def width(self) -> dict[bool, int]:
        return {True: self.q_wide, False: self.q_narrow}

    def planner(self, device: str = "cpu", **changes: Any) -> Planner:
        arguments: dict[str, Any] = {
            "q_heads": self.kv_heads * self.group,
            "kv_heads": self.kv_heads,
            "head_dim": 16,
            "max_requests": self.max_requests or max(len(self.q_lens), 1),
            "max_tokens": self.max_tokens or max(sum(self.q_lens), 1),
            "max_kv_len": self.max_kv_len or (max((*self.kv_lens, 1)) if self.batch_invariant else None),
            "causal": self.causal,
            "window": self.window,
            "batch_invariant": self.batch_invariant,
            "device": device,
            "tiles": Tiles(self.q_wide, self.q_narrow, self.tile_kv, self.workers, self.room),
        }
        return Planner(**(arguments | changes))

    def batch(self, device: str = "cpu") -> BlockSparse:
        return batch_of(self.q_lens, self.kv_lens, device)


def batch_of(q_lens: tuple[int, ...], kv_lens: tuple[int, ...], device: str = "cpu") -> BlockSparse:
    qo_indptr = np.concatenate([[0], np.cumsum(q_lens, dtype=np.int64)]).astype(np.int32)
    return BlockSparse.from_block_table(
        torch.from_numpy(qo_indptr).to(device),
        torch.tensor(kv_lens, dtype=torch.int32, device=device),
        torch.zeros(max(len(q_lens), 1), 1, dtype=torch.int32, device=device),
        page_size=16,
    )


@st.composite
def setups(draw: st.DrawFn, batch_invariant: bool | None = False, **fixed: Any) -> Setup:
    """Zero-length requests, kv_len below q_len, more workers than work and the reverse."""
    q_len = st.one_of(st.just(0), st.just(1), st.integers(2, 40))
    lengths = draw(st.lists(st.tuples(q_len, st.one_of(st.integers(0, 30), st.integers(0, 400))), max_size=8))
    invariant = draw(st.booleans()) if batch_invariant is None else batch_invariant
    drawn: dict[str, Any] = {
        "q_lens": tuple(q for q, _ in lengths),
        "kv_lens": tuple(k for _, k in lengths),
        "kv_heads": draw(st.integers(1, 3)),
        "group": draw(st.integers(1, 9)),
        "workers": draw(st.one_of(st.integers(1, 8), st.integers(1, 80))),
        "tile_kv": draw(st.sampled_from((1, 2, 4, 8))),
        "causal": draw(st.booleans()),
        "window": draw(st.one_of(st.none(), st.integers(1, 60))),
        "batch_invariant": invariant,
        "room": draw(st.sampled_from((80, 90))),
    }
    return Setup(**(drawn | fixed))


@dataclass(frozen=True)
class Arrays:
    """What a plan's counts cover, copied. items and merges: [n, 8]; worker_indptr: [rounds * workers + 1]."""

    items: np.ndarray
    merges: np.ndarray
    worker_indptr: np.ndarray
    slots: int
    segments: int
    slice: int
    total: int
    rounds: int


def arrays(plan: Plan) -> Arrays:
    header = plan.header.cpu().numpy()
    slice_, total = header[4:8].view(np.int64)
    return Arrays(
        plan.items[: header[0]].cpu().numpy().copy(),
        plan.merges[: header[1]].cpu().numpy().copy(),
        plan.worker_indptr[: header[9] * plan.planner.tiles.workers + 1].cpu().numpy().copy(),
        int(header[2]),
        int(header[3]),
        int(slice_),
        int(total),
        int(header[9]),
    )


def allowed(s: Setup, q_len: int, kv_len: int) -> np.ndarray:
    """[rows, keys] bool: what attention reads for one head of one request."""
    position = (kv_len - q_len + np.arange(q_len * s.group) // s.group)[:, None]
    key = np.arange(kv_len)[None, :]
    mask = np.ones((q_len * s.group, kv_len), dtype=bool)
    if s.causal:
        mask &= key <= position
    if s.window is not None:
        mask &= key > position - s.window
    return mask


def check_cover(s: Setup, plan: Arrays, true_kv_lens: tuple[int, ...] | None = None) -> None:
    """Every allowed (row, key) pair is read once, every row is written by someone.

    Items are clamped as executors do: to the true kv_len and the variant's keys; a first piece begins where
    the variant says even below its kv_begin.
    """
    kv_lens = s.kv_lens if true_kv_lens is None else true_kv_lens
    reads = {
        (r, h): np.zeros((q * s.group, kv), dtype=np.int32)
        for r, (q, kv) in enumerate(zip(s.q_lens, kv_lens, strict=True))
        for h in range(s.kv_heads)
    }
    first_pieces = {key: np.zeros(len(x), dtype=np.int32) for key, x in reads.items()}
    for request, row, head, begin, end, _, flags, level in plan.items.tolist():
        assert begin % s.tile_kv == 0 and end % s.tile_kv == 0 and 0 <= begin <= end and level == 0
        rows = slice(row, row + s.width[bool(flags & WIDE)])
        assert len(first_pieces[request, head][rows]) > 0
        if flags & FIRST:
            first_pieces[request, head][rows] += 1
            begin = 0
        reads[request, head][rows, begin:end] += 1
    for (request, head), count in reads.items():
        mask = allowed(s, s.q_lens[request], kv_lens[request])
        assert (count[mask] == 1).all(), (
            f"request {request} head {head}: {np.argwhere((count != 1) & mask)[:3]}"
        )
        assert (first_pieces[request, head] == 1).all()


def check_numbering(s: Setup, plan: Arrays) -> None:
    """Items belong to workers in order; split tiles own consecutive slots in key order and one merge each."""
    assert plan.worker_indptr[0] == 0 and plan.worker_indptr[-1] == len(plan.items)
    assert (np.diff(plan.worker_indptr) >= 0).all()
    tiles: dict[tuple[int, int, int], list[tuple[int, int, int, int]]] = {}
    for request, row, head, begin, end, slot, flags, _ in plan.items.tolist():
        tiles.setdefault((request, row, head), []).append((begin, end, slot, flags))
    merges = {(m[0], m[1], m[2]): m for m in plan.merges.tolist()}
    assert len(merges) == len(plan.merges)
    used: list[int] = []
    for key, pieces in tiles.items():
        slots = [p[2] for p in pieces]
        if len(pieces) == 1:
            assert slots == [-1] and key not in merges, "a tile that is not split writes the output directly"
            continue
        assert pieces == sorted(pieces)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
        assert slots == list(range(slots[0], slots[0] + len(slots)))
        assert merges.pop(key) == [*key, slots[0], slots[-1] + 1, -1, pieces[0][3] & WIDE, 0]
        used += slots
    assert not merges and sorted(used) == list(range(plan.slots))


def item_costs(s: Setup, plan: Arrays, cost: Any) -> np.ndarray:
    tiles = (plan.items[:, 4] - plan.items[:, 3]) // s.tile_kv
    return cost.of_items(tiles, plan.items[:, 6] & WIDE)


def worker_loads(s: Setup, plan: Arrays, cost: Any) -> np.ndarray:
    ends = np.concatenate([[0], np.cumsum(item_costs(s, plan, cost))])
    return np.diff(ends[plan.worker_indptr]).reshape(plan.rounds, -1).sum(0)
