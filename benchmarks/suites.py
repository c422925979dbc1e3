"""The kernel suites: `python -m benchmarks decode prefill mixed plan --peers fa3,flashinfer --out FILE`.

Ours and the peers run in one process on the same tensors: compare figures only within one run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import builds, peer_builds, peers, streaming
from .cases import SUITES, Case, of_suite
from .data import make, relative_error
from .engine_process import say
from .implementations import OURS, Unsupported
from .measure import Spread, device_us, host_us, layer_us, step_us
from .meta import meta
from .report import markdown

Row = dict[str, Any]
SERVE = "Whole engines: python -m benchmarks serve --engine {vllm,sglang} --help"


def measure(case: Case, name: str, device: torch.device) -> Row:
    """One row of a results file. Raises Unsupported."""
    data = make(case, device)
    prepare = {**OURS, **peers.PEERS}[name]
    row: Row = {"suite": case.suite, "case": case.id, "impl": name}
    if case.suite == "streaming":
        step = streaming.decode_step(data, prepare)
        row |= rounded(step_us(step, device)) | {"layers": streaming.LAYERS}
        return row | {"rel_err": shortened(relative_error(data, data.out))}
    prepared = prepare(data)
    if case.suite == "plan":
        row |= rounded(host_us(prepared.plan, device))
        if name == "fi" and device.type == "cuda":  # peers plan on the host
            row["gpu_us"] = round(device_us(prepared.plan, device).us, 2)
        return row
    error = relative_error(data, prepared.run().reshape(data.out.shape))
    if case.suite == "layers":
        qkv = (case.q_heads + 2 * case.kv_heads) * case.head_dim
        return row | rounded(layer_us(prepared.run, case.tokens, qkv, device)) | {"rel_err": shortened(error)}
    # chosen anew in every step: planned anew, too
    spread = device_us(prepared.plan_and_run if case.suite == "sparse" else prepared.run, device)
    if prepared.list_tiles is not None:
        row["list_us"] = round(device_us(prepared.list_tiles, device).us, 2)
        row["list_and_plan_us"] = round(device_us(prepared.plan, device).us, 2)
    if case.prefix and name in OURS:  # once a step
        row["plan_us"] = round(device_us(prepared.plan, device).us, 2)
    return row | {
        **rounded(spread),
        "tb_s": round(case.bytes / spread.us / 1e6, 3),
        "tflop_s": round(case.flops / spread.us / 1e6, 1),
        "rel_err": shortened(error),
    }


def shortened(x: float) -> float:
    return float(f"{x:.3g}")


def rounded(spread: Spread) -> dict[str, float]:
    return {name: round(us, 2) for name, us in spread._asdict().items()}


def rows(suites: list[str], cases: list[Case], names: list[str], device: torch.device) -> Iterator[Row]:
    if "jit" in suites:
        for arch in builds.arches(device):
            for row in builds.rows(arch):
                say(f"{row['case']}: {row['seconds']} s")
                yield row
    for number, case in enumerate(cases, 1):
        for name in [*(OURS if case.prefix else ["fi"]), *([] if case.alone else names)]:
            place = f"[{number}/{len(cases)}] {case.id} {name}"
            try:
                row = measure(case, name, device)
            except Unsupported as reason:
                say(f"{place}: left out, {reason}")
            except Exception as error:
                if name in OURS:
                    raise
                # a peer that is absent or breaks costs its own row only
                say(f"{place}: failed, {error}")
            else:
                say(f"{place}: {row['us']} us")
                yield row


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, epilog=SERVE)
    parser.add_argument("suites", nargs="+", choices=(*SUITES, "jit"))
    parser.add_argument(
        "--peers", type=peers.names, default=[], help="fa3, flashinfer or one of its wrappers, flex, rope"
    )
    parser.add_argument("--case", action="append", default=[], help="only this case id (repeatable)")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write a results file (JSON)")
    args = parser.parse_args(arguments)

    cases = [c for suite in args.suites for c in of_suite(suite) if not args.case or c.id in args.case]
    if not cases and "jit" not in args.suites:
        parser.error(f"no case {', '.join(args.case)} in {', '.join(args.suites)}")
    peer_builds.build(args.peers, cases)
    result: dict[str, Any] = {"meta": meta(args.device), "rows": []}
    for row in rows(args.suites, cases, args.peers, args.device):
        result["rows"].append(row)
        if args.out:  # after every row: a run that is cut short keeps what it measured
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))
