"""Clocks. On a GPU every run starts with a flushed L2."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

PLAN_RUNS = 200
QUANTILES = (0.5, 0.1, 0.9)


class Spread(NamedTuple):
    """Median, 10th and 90th percentile of one call, microseconds."""

    us: float
    us_p10: float
    us_p90: float


def device_us(run: Callable[[], object], device: torch.device) -> Spread:
    """Time of one run on the device. On a CPU: of three runs by the wall clock."""
    if device.type == "cpu":
        return _spread([_wall_us(run) for _ in range(3)])
    from triton.testing import do_bench

    # do_bench overwrites a buffer larger than the L2 before each run and times with events.
    ms = do_bench(run, warmup=25, rep=100, quantiles=QUANTILES)
    return Spread(*(1000 * x for x in ms))


def host_us(plan: Callable[[], object], device: torch.device) -> Spread:
    """Time the host spends in one call, the device idle when it begins."""
    times = []
    for _ in range(PLAN_RUNS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(_wall_us(plan))
    return _spread(times)


def _spread(times: list[float]) -> Spread:
    return Spread(*np.quantile(times, QUANTILES).tolist())


def _wall_us(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)
