"""Our cost line against Algorithm 1 of the FlashInfer paper, by simulation: no GPU is needed.

Both see the same row tiles, pruned KV ranges and costs (csrc/cost.h). `most/mean` is the busiest worker's
cost over the unsplit work divided by the workers: 1 would be perfect and free of splits. `us` is the median
time of the host planner, C++ called from Python, in microseconds.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fi_backend import env, jit
from fi_backend.formats import BlockSparse
from fi_backend.plan import Planner, Tiles, cost_model

from .cases import lengths

KINDS = ("constant", "uniform", "zipf")
Q_HEADS, KV_HEADS = 32, 8


class Row(NamedTuple):
    most_over_mean: float
    items: int
    partial_states: int
    merges: int
    us: float


def batches(kind: str) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Name, query lengths, KV lengths."""
    for requests, mean in ((16, 1024), (64, 4096), (256, 2048)):
        yield f"decode {requests} x {mean}", (1,) * requests, lengths(kind, requests, mean)
    for requests, mean in ((16, 1024), (4, 8192)):
        yield f"prefill {requests} x {mean}", (n := lengths(kind, requests, mean)), n
    kv = lengths(kind, 130, 4096)
    q = (1,) * 128 + tuple(min(1024, n) for n in kv[128:])
    yield "mixed 128 x 4096 + 2 x 1024 rows", q, kv


def median_us(call: Callable[[], object], repeat: int = 30) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def ours(planner: Planner, batch: BlockSparse, mean: float) -> Row:
    cost = cost_model()
    plan = planner.plan(batch)
    n, merges, slots, _ = plan.header[:4].tolist()
    items = plan.items[:n].numpy()
    tiles = (items[:, 4] - items[:, 3]) // planner.tiles.kv
    ends = np.cumsum(cost.of_items(tiles, items[:, 6] & 1))
    load = np.diff(np.concatenate([[0], ends])[plan.worker_indptr[: planner.tiles.workers + 1].numpy()])
    return Row(load.max() / mean, n, slots, merges, median_us(lambda: planner.plan(batch)))


def paper(library: ctypes.CDLL, planner: Planner, batch: BlockSparse, mean: float) -> Row:
    tiles, result = planner.tiles, (ctypes.c_int64 * 4)()

    def call() -> None:
        library.paper_plan(
            ctypes.c_void_p(batch.qo_indptr.data_ptr()),
            ctypes.c_void_p(batch.kv_len.data_ptr()),
            *(batch.num_requests, planner.kv_heads, planner.group),
            *(tiles.workers, tiles.q_wide, tiles.q_narrow, tiles.kv),
            result,
        )

    us = median_us(call)
    return Row(result[0] / mean, result[1], result[2], result[3], us)


def build(folder: Path) -> ctypes.CDLL:
    source, target = Path(__file__).with_name("paper_plan.cpp"), folder / "paper_plan.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", f"-I{jit.csrc()}"]
    subprocess.run([env.host_compiler(), *flags, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def simulate(library: ctypes.CDLL, workers: int, kind: str) -> Iterator[str]:
    wide, narrow, kv, *_ = jit.core().plan_tiles(80, 90, 128, 128)
    tiles = Tiles(wide, narrow, kv, workers)
    for name, q_lens, kv_lens in batches(kind):
        qo_indptr = torch.tensor([0, *q_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        kv_len = torch.tensor(kv_lens, dtype=torch.int32)
        table = torch.zeros(len(q_lens), 1, dtype=torch.int32)
        batch = BlockSparse.from_block_table(qo_indptr, kv_len, table, page_size=16)
        planner = Planner(
            q_heads=Q_HEADS,
            kv_heads=KV_HEADS,
            head_dim=128,
            max_requests=len(q_lens),
            max_tokens=sum(q_lens),
            device="cpu",
            tiles=tiles,
        )
        planner.plan(batch)
        mean = int(planner.header[6:8].view(torch.int64)) / workers
        for algorithm, row in (
            ("cost line", ours(planner, batch, mean)),
            ("Algorithm 1", paper(library, planner, batch, mean)),
        ):
            yield (
                f"| {name} | {kind} | {workers} | {algorithm} | {row.most_over_mean:.3f} | {row.items} "
                f"| {row.partial_states} | {row.merges} | {row.us:.0f} |"
            )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks plan-sim", description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[132, 264])
    options = parser.parse_args(arguments)
    print("| batch | lengths | workers | algorithm | most/mean | items | partial states | merges | us |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        for workers in options.workers:
            for kind in KINDS:
                for line in simulate(library, workers, kind):
                    print(line, flush=True)


if __name__ == "__main__":
    main()
