"""Planners of engines: who shares one, the memory they share, and how many plans they made."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from typing import Any

import torch

from ..formats import BlockSparse
from ..plan import Plan, Planner

_made = 0
_workspaces: dict[torch.device, torch.Tensor] = {}


def made() -> None:
    """An adapter calls this for every plan that it makes."""
    global _made
    _made += 1


def plans_written() -> int:
    """Plans that adapters of this process have made: 0 if another backend served."""
    return _made


def workspace(device: torch.device, nbytes: int) -> torch.Tensor:
    """At least nbytes uint8 on this device (a GPU with its index), the same memory for all who ask.

    Only for planners whose attention runs one after another, on one stream. A larger wish is met with new
    memory, and the old stays with the planners that hold it: captured graphs know its address. Pass this
    function as the `workspace` of a Planner.
    """
    found = _workspaces.get(device)
    if found is None or found.numel() < nbytes:
        found = _workspaces[device] = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return found


class SharedPlanner:
    """One planner for takers of equal plan inputs. `step` counts the plans written into its buffers."""

    def __init__(self, planner: Planner, key: tuple[Any, ...]) -> None:
        self.planner = planner
        self.key = key
        self.layers: set[str] = set()
        self.step = 0
        self._plan: Plan | None = None
        self._sizes: tuple[int, ...] = ()
        self._served: set[int] = set()

    def plan(self, taker: int, batch: BlockSparse, *sizes: int) -> Plan:
        """The plan of this step. A taker that already has the current one is in a new step: it plans again.

        For engines that make new views of the lengths in every step, so that the same objects mean the same
        step; the sizes are compared too, for one that would keep its views.
        """
        last = self._plan
        if (
            last is not None
            and last.planned.qo_indptr is batch.qo_indptr
            and last.planned.kv_len is batch.kv_len
            and taker not in self._served
            and sizes == self._sizes
        ):
            self._served.add(taker)
            return last.rebind(batch)
        self.step += 1
        made()
        self._plan = self.planner.plan(batch)
        self._sizes = sizes
        self._served = {taker}
        return self._plan

    def check(self, step: int) -> None:
        """Raises RuntimeError if the plan of this step is no longer the one in the buffers."""
        if step != self.step:
            raise RuntimeError(
                f"fi_backend: plan {step} was overwritten by plan {self.step} before its "
                "layers ran: two cache groups that share a planner got different lengths in one step"
            )


_planners: weakref.WeakValueDictionary[int, SharedPlanner] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def planners() -> list[SharedPlanner]:
    """Those of this process that are alive, oldest first."""
    return list(_planners.values())


def share(
    layers: Iterable[str], key: tuple[Any, ...], *, overlapping: bool = False, **options: Any
) -> SharedPlanner:
    """A planner of these options (Planner's) for a group of layers.

    Groups of equal key and options share it, and all share the workspace, unless they are overlapping: their
    steps run beside those of other groups. A layer that is already served by a planner has a second group for
    another purpose (micro-batches, a draft loop): that one must not write into the same buffers. The oldest
    that fits is taken, so the first micro-batch of one group never shares with the second of another.
    """
    layers = set(layers)
    key = (*key, *options.values())
    if overlapping:
        key += tuple(sorted(layers))
    for shared in planners():
        if shared.key == key and shared.layers.isdisjoint(layers):
            break
    else:
        shared = SharedPlanner(Planner(**options, workspace=None if overlapping else workspace), key)
        _planners[next(_numbers)] = shared
    shared.layers |= layers
    return shared
