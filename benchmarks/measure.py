"""Clocks. On a GPU every run starts with a flushed L2."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

PLAN_RUNS = 200


def device_us(run: Callable[[], object], device: torch.device) -> float:
    """Median time of one run on the device, microseconds. On a CPU: of three runs by the wall clock."""
    if device.type == "cpu":
        return statistics.median(_wall_us(run) for _ in range(3))
    from triton.testing import do_bench

    # do_bench overwrites a buffer larger than the L2 before each run and times with events.
    return 1000 * do_bench(run, warmup=25, rep=100, return_mode="median")


def host_us(plan: Callable[[], object], device: torch.device) -> float:
    """Median time the host spends in one call, microseconds, the device idle when it begins."""
    times = []
    for _ in range(PLAN_RUNS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(_wall_us(plan))
    return statistics.median(times)


def _wall_us(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)
