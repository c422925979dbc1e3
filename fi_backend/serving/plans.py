"""Planners of engines: who shares one, the memory they share, and how many plans they made."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..formats import BlockSparse, Composable
from ..plan import Plan, Planner
from . import kernels, saved
from .sharing import Sharing

if TYPE_CHECKING:
    from .layer import AttentionLayer

_made = 0
_workspaces: dict[torch.device, torch.Tensor] = {}


def made() -> None:
    """An adapter calls this for every plan that it makes."""
    global _made
    _made += 1


def plans_written() -> int:
    """Plans that adapters of this process have made: 0 if another backend served."""
    return _made


def plan(planner: Planner, batch: BlockSparse) -> Plan:
    """Plans a step; with levels of the planner, over the prefixes that the batch's page table shows."""
    made()
    return planner.plan(batch if planner.finder is None else Composable(batch))


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
        saved.look()
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
        self._plan = plan(self.planner, batch)
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
    names: Iterable[str],
    key: tuple[Any, ...],
    *,
    overlapping: bool = False,
    layers: Sequence[AttentionLayer] = (),
    sharing: Sharing | None = None,
    **options: Any,
) -> SharedPlanner:
    """A planner of these options (Planner's) for a group of layers, whose kernels are loaded then.

    Groups of equal key and options share it, and all share the workspace, unless they are overlapping: their
    steps run beside those of other groups. With shared prefixes (sharing) a plan depends on page tables, so a
    group has a planner of its own. A name that is already served by a planner has a second group for another
    purpose (micro-batches, a draft loop): that one must not write into the same buffers. The oldest that fits
    is taken, so the first micro-batch of one group never shares with the second of another.
    """
    served = set(names)
    if sharing is not None:
        options |= sharing.options(options)
    with_levels = options.get("levels", 1) > 1
    key = (*key, *options.values())
    if overlapping or with_levels:
        key += tuple(sorted(served))
    for shared in planners():
        if shared.key == key and shared.layers.isdisjoint(served):
            break
    else:
        shared = SharedPlanner(Planner(**options, workspace=None if overlapping else workspace), key)
        _planners[next(_numbers)] = shared
        if with_levels and layers:
            saved.watch(shared.planner, len(served), layers[0].dtype.itemsize)
    shared.layers |= served
    for layer in layers:
        layer.build(levels=with_levels)
    kernels.load()
    return shared
