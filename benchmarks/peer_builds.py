"""FlashInfer compiles each wrapper and head dim at its first use, 30 to 70 s each: here all side by side."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from .cases import Case
from .data import make
from .engine_process import ROOT, say
from .peer_flashinfer import HEAD_DIMS, WRAPPERS


def build(names: list[str], cases: list[Case]) -> None:
    dims = {c.head_dim for c in cases}.intersection(HEAD_DIMS)
    wanted = {(name, dim) for name in WRAPPERS if name in names for dim in dims}
    if not any(c.prefix for c in cases):
        wanted = {job for job in wanted if job[0] != "flashinfer_cascade"}
    if not wanted:
        return
    say(f"building {len(wanted)} FlashInfer modules ...")
    start = time.monotonic()
    # ninja would start a compiler per core in each of them, at 2 to 4 GB a compiler
    jobs = max(1, 2 * (os.cpu_count() or 1) // len(wanted))
    environment = {"MAX_JOBS": str(jobs), **os.environ}

    def build_one(job: tuple[str, int]) -> None:
        code = f"from benchmarks.peer_builds import first_use; first_use({job[0]!r}, {job[1]})"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        took = f"{time.monotonic() - start:.0f} s"
        failed = f"failed: {done.stderr.strip().splitlines()[-1:]}" if done.returncode else "built"
        say(f"  {job[0]} head dim {job[1]}: {failed} after {took}")

    with ThreadPoolExecutor(len(wanted)) as pool:
        list(pool.map(build_one, sorted(wanted)))


def first_use(name: str, head_dim: int) -> None:
    case = Case("first-use", "decode", (1,), (64,), head_dim=head_dim, prefix=32)
    WRAPPERS[name](make(case, torch.device("cuda"))).run()
