"""When each work item of a plan begins and ends, written down by a profiling build of its executor."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .formats import KVCache
from .plan import Plan
from .run import bind, make_runner, run


@dataclass(frozen=True)
class Times:
    """Begin and end, nanoseconds after the first item began: items [items, 2] and merges [merges, 2] int64.

    The clock of a GPU may tick as seldom as once a microsecond.
    """

    items: np.ndarray
    merges: np.ndarray


def measure(plan: Plan, q: torch.Tensor, kv: KVCache, **arguments: Any) -> Times:
    """Runs the plan twice with a profiling build, and returns the times of the second run.

    Takes what `run` takes, and computes what it computes. On a GPU the L2 cache is overwritten in between, as
    the layers of a model do. Waits for the plan and for the run. Raises what `run` and `Plan.check` raise.
    """
    plan.check()
    # shares the planner's buffers, but has a runner of its own, so that `run` need not know of profiling
    planner = copy.copy(plan.planner)
    make_runner(planner, profile=True)
    profiled = Plan(planner, plan.batch, plan.planned)
    items, merges = plan.header[:2].tolist()
    raw = torch.zeros(items + merges, 2, dtype=torch.int64, device=planner.device)
    bind(profiled, raw)
    for _ in range(2):
        if planner.device.type == "cuda":
            cache = torch.cuda.get_device_properties(planner.device).L2_cache_size
            torch.zeros(2 * cache, dtype=torch.uint8, device=planner.device)
        run(profiled, q, kv, **arguments)
    times = raw.cpu().numpy()
    ran = times[:, 1] > 0  # with levels not all merges: rows are joined by the places of prefixes
    times[ran] -= times[ran, 0].min(initial=np.iinfo(np.int64).max)
    return Times(times[:items], times[items:])
