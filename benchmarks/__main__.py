"""Kernel benchmarks: `python -m benchmarks decode prefill mixed plan --peers fa3,flashinfer --out FILE`.

Ours and the peers run in one process on the same tensors: compare figures only within one run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .cases import SUITES, Case, of_suite
from .data import make, relative_error
from .implementations import EVERY_PEER, PEERS, Unsupported, fi
from .measure import Spread, device_us, host_us
from .report import table

ROOT = Path(__file__).resolve().parent.parent


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(case: Case, name: str, device: torch.device) -> dict[str, Any]:
    """One row of a results file. Raises Unsupported."""
    data = make(case, device)
    prepared = (fi if name == "fi" else EVERY_PEER[name])(data)
    row: dict[str, Any] = {"suite": case.suite, "case": case.id, "impl": name}
    if case.suite == "plan":
        row |= rounded(host_us(prepared.plan, device))
        if name == "fi" and device.type == "cuda":  # peers plan on the host
            row["gpu_us"] = round(device_us(prepared.plan, device).us, 2)
        return row
    error = relative_error(data, prepared.run())
    spread = device_us(prepared.run, device)
    return row | {
        **rounded(spread),
        "tb_s": round(case.bytes / spread.us / 1e6, 3),
        "tflop_s": round(case.flops / spread.us / 1e6, 1),
        "rel_err": float(f"{error:.3g}"),
    }


def rounded(spread: Spread) -> dict[str, float]:
    return {name: round(us, 2) for name, us in spread._asdict().items()}


def build_peers(names: list[str], cases: list[Case]) -> None:
    """FlashInfer compiles each wrapper and head dim at first use, 30 to 70 s each: all side by side."""
    wanted = sorted({(name, c.head_dim) for name in names if name.startswith("flashinfer") for c in cases})
    if not wanted:
        return
    say(f"building {len(wanted)} FlashInfer modules ...")
    start = time.monotonic()
    # ninja would start a compiler per core in each of them, at 2 to 4 GB a compiler
    jobs = max(1, 2 * (os.cpu_count() or 1) // len(wanted))
    environment = {"MAX_JOBS": str(jobs), **os.environ}

    def build(job: tuple[str, int]) -> None:
        code = f"from benchmarks.__main__ import first_use; first_use({job[0]!r}, {job[1]})"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        took = f"{time.monotonic() - start:.0f} s"
        failed = f"failed: {done.stderr.strip().splitlines()[-1:]}" if done.returncode else "built"
        say(f"  {job[0]} head dim {job[1]}: {failed} after {took}")

    with ThreadPoolExecutor(len(wanted)) as pool:
        list(pool.map(build, wanted))


def first_use(name: str, head_dim: int) -> None:
    case = Case("first-use", "decode", (1,), (64,), head_dim=head_dim)
    EVERY_PEER[name](make(case, torch.device("cuda"))).run()


def meta(device: torch.device) -> dict[str, str]:
    def output(*command: str) -> str:
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:
            return ""

    gpu = device.type == "cuda"
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "card": torch.cuda.get_device_name(device) if gpu else "cpu",
        "driver": output(*query).split("\n")[0] if gpu else "",
        "torch": torch.__version__,
        # a copy of the tree on a GPU host has no git history
        "commit": os.environ.get("FI_COMMIT") or output("git", "rev-parse", "HEAD"),
        "date": datetime.date.today().isoformat(),
    }


def peer_names(text: str) -> list[str]:
    names: list[str] = []
    for word in filter(None, text.split(",")):
        if word not in PEERS and word not in EVERY_PEER:
            known = ", ".join({**PEERS, **EVERY_PEER})
            raise argparse.ArgumentTypeError(f"expected peers among {known}, got {word}")
        names += list(PEERS[word]) if word in PEERS else [word]
    return list(dict.fromkeys(names))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="+", choices=SUITES)
    parser.add_argument(
        "--peers", type=peer_names, default=[], help="fa3, flashinfer, or one of its wrappers"
    )
    parser.add_argument("--case", action="append", default=[], help="only this case id (repeatable)")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write a results file (JSON)")
    args = parser.parse_args()

    cases = [c for suite in args.suites for c in of_suite(suite) if not args.case or c.id in args.case]
    if not cases:
        parser.error(f"no case {', '.join(args.case)} in {', '.join(args.suites)}")
    build_peers(args.peers, cases)
    result: dict[str, Any] = {"meta": meta(args.device), "rows": []}
    for number, case in enumerate(cases, 1):
        for name in ["fi", *args.peers]:
            try:
                row = measure(case, name, args.device)
            except Unsupported as reason:
                say(f"[{number}/{len(cases)}] {case.id} {name}: left out, {reason}")
                continue
            except Exception as error:
                if name == "fi":
                    raise
                # a peer that is absent or breaks costs its own row only
                say(f"[{number}/{len(cases)}] {case.id} {name}: failed, {error}")
                continue
            say(f"[{number}/{len(cases)}] {case.id} {name}: {row['us']} us")
            result["rows"].append(row)
            if args.out:  # after every row: a run that is cut short keeps what it measured
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
