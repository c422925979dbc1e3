"""Clocks. On a GPU every run starts with a flushed L2."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

PLAN_RUNS = 200
LAYERS, REPLAYS = 8, 30
STEPS = 20
HIDDEN, INTERMEDIATE = 4096, 14336
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


def layer_us(run: Callable[[], object], tokens: int, qkv: int, device: torch.device) -> Spread:
    """What run adds to a layer of an 8B model: CUDA graphs of layers with it and without.

    In a model every run follows matrix products that leave neither its data nor its machine code in a cache.
    """
    if device.type != "cuda":
        raise ValueError(f"expected a GPU, whose graphs hold the layers, got {device}")
    graphs = [_layers(step, tokens, qkv, device) for step in (run, lambda: None)]
    times = np.array([[_replay_us(graph) for graph in graphs] for _ in range(REPLAYS)])
    return _spread(((times[:, 0] - times[:, 1]) / LAYERS).tolist())


def step_us(step: Callable[[], object], device: torch.device) -> Spread:
    """Time of a model's step, by a CUDA graph of it; on a CPU as in device_us."""
    if device.type == "cpu":
        return device_us(step, device)
    graph = _captured(step, device)
    return _spread([_replay_us(graph) for _ in range(STEPS + 1)][1:])


@functools.cache
def _weights(qkv: int, device: torch.device) -> list[list[torch.Tensor]]:
    shapes = ((HIDDEN, qkv), (HIDDEN, HIDDEN), (HIDDEN, 2 * INTERMEDIATE), (INTERMEDIATE, HIDDEN))
    return [
        [torch.zeros(*shape, dtype=torch.bfloat16, device=device) for shape in shapes] for _ in range(LAYERS)
    ]


def _layers(run: Callable[[], object], tokens: int, qkv: int, device: torch.device) -> torch.cuda.CUDAGraph:
    weights = _weights(qkv, device)
    x = weights[0][-1][:tokens]  # as good as any

    def step() -> None:
        for into_qkv, out, up, down in weights:
            x @ into_qkv
            run()
            x @ out
            (x @ up)[:, :INTERMEDIATE] @ down

    return _captured(step, device)


def _captured(step: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    step()  # libraries and kernels are loaded outside of the capture
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1000 * start.elapsed_time(end)


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
