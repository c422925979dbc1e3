"""Every GPU kernel on small shapes under compute-sanitizer: `python tests/sanitize.py [TOOL ...]`.

Tools: memcheck, racecheck, synccheck, initcheck (default: all). Prints one line a tool; exits 1 if one found
anything. The kernels are built first, outside the sanitizer.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import checks  # noqa: E402
from cases import Case, make  # noqa: E402
from grid import EVERYTHING, SHARED, SMALL  # noqa: E402
from test_prefixes import family  # noqa: E402

from fi_backend import Composable, append  # noqa: E402

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# swizzled and padded shared memory, wide heads
CASES = [
    SMALL,
    replace(SMALL, head_dim=128, page_size=3, table="token", dtype="f16"),
    replace(SMALL, page_size=1, run=150, table="token"),
    replace(SMALL, head_dim=80, layout="packed", variant=EVERYTHING),
    replace(SMALL, q_lens=(7,) * 3, kv_lens=(7, 200, 66), head_dim=128, q_heads=8, variant="CAUSAL+TREE"),
    replace(SMALL, head_dim=256, layout="HND", table="csr"),
    replace(SMALL, head_dim=128, variant="CAUSAL+QK_NORM+ROPE"),
    replace(SMALL, variant="CAUSAL+DOCUMENT"),
    replace(SMALL, head_dim=192, head_dim_vo=128, variant="FULL"),
    Case((40, 1), (2100, 2100), q_heads=4, kv_heads=1),  # batch invariant: chunks joined in the kernel
]
SHARING = [replace(SHARED, head_dim=128), replace(SHARED, head_dim=32, page_size=1, table="token")]


def exercise() -> None:
    for case in CASES:
        inputs = make(case, "cuda")
        for workers, batch_invariant in ((None, False), (7, False), (5, True)):
            planner = checks.planner_for(inputs, workers, batch_invariant=batch_invariant)
            checks.run_inputs(planner.plan(inputs.batch), inputs)
        if case.variant == "CAUSAL+DOCUMENT":
            skipping = {"causal": None, "window": None, "skip": inputs.variant}
            planner = checks.planner_for(inputs, **skipping)
            checks.run_inputs(planner.plan(inputs.batch, **inputs.variant_args), inputs)
        key, value = inputs.kv.k[:1, :3].flatten(0, 1).clone(), inputs.kv.v[:1, :3].flatten(0, 1).clone()
        slots = torch.arange(-1, len(key) - 1, device="cuda")
        append(inputs.kv, key, value, slots)
    for case in SHARING:
        inputs = make(case, "cuda")
        for workers in (3, 40):
            planner = checks.sharing_planner(inputs, workers=workers)
            checks.run_inputs(planner.plan(Composable(inputs.batch)), inputs)
    for groups in ([[1]], [[70], [40, 30]]):
        shared = family(groups, [256, 128][: len(groups)])
        shared.finder("cuda").find(shared.batch("cuda"))
    torch.cuda.synchronize()


def only_ours(tool: str) -> list[str]:
    # initcheck must see torch's kernels too: it learns from their writes what is initialised
    return [] if tool == "initcheck" else ["--kernel-name", "kernel_substring=_ZN2fi"]


def main() -> None:
    tools = sys.argv[1:] or list(TOOLS)
    if tools == ["--exercise"]:
        exercise()
        return
    if unknown := set(tools) - set(TOOLS):
        raise SystemExit(f"expected tools among {', '.join(TOOLS)}, got {', '.join(sorted(unknown))}")
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for batch_invariant in (False, True):
        checks.build(CASES, "cuda", ("bf16", "f16"), batch_invariant=batch_invariant)
    checks.build(SHARING, "cuda", ("bf16",), levels=True)
    # torch's allocator hides allocations from memcheck and initcheck
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    exercise_command = [sys.executable, __file__, "--exercise"]
    running = {
        tool: subprocess.Popen(
            [sanitizer, "--tool", tool, *only_ours(tool), "--error-exitcode", "9", *exercise_command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for tool in tools
    }
    failed = False
    for tool, process in running.items():
        output = process.communicate()[0]
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
        clean = process.returncode == 0 and bool(summary)
        print(
            f"{tool}: {summary[-1] if summary else 'no summary'}, exit code {process.returncode}", flush=True
        )
        if not clean:
            failed = True
            print(output[-4000:])
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
