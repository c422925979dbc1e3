"""A plan read back: who does what, at which predicted cost, and when it happened if it was measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..measure import Times
from ..plan import Plan, cost_model


@dataclass(frozen=True)
class Clock:
    """Begin and end of the items, then of the merges if they are timed. load [workers]: of items alone."""

    name: str
    unit: str
    begin: np.ndarray
    end: np.ndarray
    worker: np.ndarray
    load: np.ndarray
    notes: tuple[str, ...]

    def summary(self) -> str:
        mean, most, idle = self.load.mean(), self.load.max(), int((self.load == 0).sum())
        above = most / mean - 1 if mean else 0.0
        return (
            f"{self.name}, load of {self.load.size} workers in {self.unit}: mean {mean:.1f}, most {most:.1f} "
            f"(worker {int(self.load.argmax())}), imbalance {above:.1%}, {idle} idle"
        )


class Schedule:
    """items [n, 8] and merges [m, 8] as in the plan's buffers. Of each item: its worker, its cost by
    csrc/cost.h, its rows, and whether it is of a prefill: a request of more rows than a narrow tile has."""

    def __init__(self, plan: Plan) -> None:
        plan.check()
        tiles, self.skips = plan.planner.tiles, plan.planner.skip is not None
        cost = cost_model(tiles.room)
        items, merges, self.slots, self.row_tiles = plan.header[:4].tolist()
        self.items = plan.items[:items].cpu().numpy()
        self.merges = plan.merges[:merges].cpu().numpy()
        self.workers, self.device = tiles.workers, plan.planner.device
        rounds = int(plan.header[9])
        of_slices = np.diff(plan.worker_indptr[: rounds * tiles.workers + 1].cpu().numpy())
        self.worker = np.repeat(np.tile(np.arange(tiles.workers), rounds), of_slices)
        wide = (self.items[:, 6] & 1).astype(bool)
        self.tile_kv = tiles.kv
        kv_tiles = (self.items[:, 4] - self.items[:, 3]) // tiles.kv
        self._fixed = cost.of_items(np.zeros_like(kv_tiles), wide).sum()
        tokens = np.diff(plan.planned.qo_indptr.cpu().numpy())
        finder = plan.planner.finder
        self.prefixes = np.zeros((0, 8), np.int32)
        if finder is not None:
            cost = cost._replace(prefix=int(plan.header[12]))
        self.cost = cost.of_items(kv_tiles, wide, self.items[:, 0] < 0)
        if finder is not None:
            self.prefixes = finder.prefixes[: int(finder.header[0])].cpu().numpy()
        by_request = np.concatenate([tokens, self.prefixes[::-1, 1]])  # items name prefix i ~i: from the end
        rows = by_request[self.items[:, 0]] * plan.planner.group
        self.prefill = rows > tiles.q_narrow
        width = np.where(wide, tiles.q_wide, tiles.q_narrow)
        self.rows = np.minimum(rows - self.items[:, 1], width)

    def summary(self) -> str:
        return (
            f"{len(self.items)} items of {self.row_tiles} row tiles, {self.slots} partial states, "
            f"{len(self.merges)} merges"
        )

    def predicted(self) -> Clock:
        load = np.bincount(self.worker, self.cost, self.workers)
        order = np.argsort(self.worker, kind="stable")  # a worker's items, one after the other
        ends = np.cumsum(self.cost[order])
        of_earlier = (np.cumsum(load) - load).astype(ends.dtype)  # workers
        begin = np.empty_like(ends)
        begin[order] = ends - self.cost[order] - of_earlier[self.worker[order]]
        fixed = self._fixed / max(self.cost.sum(), 1)
        note = f"longest item {self.cost.max(initial=0)}; {fixed:.0%} is the fixed cost of items"
        return Clock(
            "predicted", "units of csrc/cost.h", begin, begin + self.cost, self.worker, load, (note,)
        )

    def measured(self, times: Times) -> Clock:
        found, wanted = (len(times.items), len(times.merges)), (len(self.items), len(self.merges))
        if found != wanted:
            raise ValueError(
                f"expected times of this plan, {wanted[0]} items and {wanted[1]} merges, "
                f"got {found[0]} and {found[1]}"
            )
        begin, end = (np.concatenate([times.items, times.merges]) / 1000).T
        took = (end - begin)[: wanted[0]]
        # on a GPU the block of a merge, which runs after all items
        worker = np.concatenate([self.worker, np.arange(wanted[1]) % self.workers])
        load = np.bincount(self.worker, took, self.workers)
        note = f"longest item {took.max(initial=0):.1f}; all {end.max(initial=0):.1f}"
        if wanted[1]:
            note += f", of which merges {end[wanted[0] :].max() - begin[wanted[0] :].min():.1f}"
        prices = [
            f"{1000 * took[of].sum() / self.cost[of].sum():.1f} ns in {name}"
            for name, of in (("decodes", ~self.prefill), ("prefills", self.prefill))
            if of.any()
        ]
        notes = (note, f"a unit of cost takes {', '.join(prices) or 'no time'}")
        return Clock(f"measured on {self.device}", "us", begin, end, worker, load, notes)

    def describe(self, i: int) -> str:
        """Item i, or merge i - items, in one line."""
        if i >= len(self.items):
            request, row, head, first, end, *_ = self.merges[i - len(self.items)].tolist()
            if request < 0:
                return "no merge: these rows are joined with those of other nodes"
            return f"merge of {end - first} pieces: request {request}, KV head {head}, from row {row}"
        request, row, head, begin, end, slot, *_ = self.items[i].tolist()
        keys = f"keys {begin} to {end}"
        if self.skips:
            keys = f"KV tiles {begin // self.tile_kv} to {end // self.tile_kv} of those it sees"
        what = f"{'prefill' if self.prefill[i] else 'decode'}: request {request}"
        if request < 0:
            what = f"prefix of {self.prefixes[~request, 5]} requests"
        state = "" if slot == -1 else f", partial state {slot}"
        if slot < -1:
            state = f", partial states from row {-2 - slot}"
        return (
            f"{what}, KV head {head}, rows {row} to {row + self.rows[i]}, {keys}, cost {self.cost[i]}{state}"
        )
