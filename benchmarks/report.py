"""The table of a results file: `python -m benchmarks.report FILE [--into README.md]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

MARKS = {True: "serving", False: "kernel"}  # whether the rows are of suite "serve"
PEERS = ("fa3", "flashinfer_fa3", "flashinfer_fa2", "flashinfer_decode", "flashinfer_persistent")


def is_serving(result: dict[str, Any]) -> bool:
    return any(row["suite"] == "serve" for row in result["rows"])


def table(result: dict[str, Any]) -> str:
    """Markdown of a results file: whole engines in seconds, or kernels in microseconds."""
    m = result["meta"]
    made = [m["card"], f"driver {m['driver'] or 'none'}", f"torch {m['torch']}"]
    made += [f"vLLM {m['vllm']}"] if "vllm" in m else []
    made += [m["date"], f"commit {m['commit'][:12]}"]
    body = _serving(result["rows"]) if is_serving(result) else _kernels(result["rows"])
    return "\n".join([*body, "", ", ".join(made) + "."])


def _serving(rows: list[dict[str, Any]]) -> list[str]:
    """One line a case, seconds of CUSTOM and of its peers.

    The first engine of a run also warms the machine for the others: its start is in the file, not here.
    A start of ours that builds all kernels stands beside the peer's warm one.
    """
    by_case: dict[str, dict[str, float]] = {}
    for row in rows:
        if "seconds" not in row or row["case"] == "start-up, first":
            continue
        cases = [row["case"]]
        if row["case"] == "start-up, warm" and row["impl"] != "CUSTOM":
            cases.append("start-up, cold")
        for case in cases:
            by_case.setdefault(case, {})[row["impl"]] = row["seconds"]
    if "start-up, cold" in by_case:
        by_case["start-up, our kernels built from nothing"] = by_case.pop("start-up, cold")
    peers = sorted({impl for found in by_case.values() for impl in found} - {"CUSTOM"})
    lines = ["| case | ours, s | " + " | ".join(f"{p}, s | ours / {p}" for p in peers) + " |"]
    lines.append("| --- | --- |" + " --- | --- |" * len(peers))
    for case, found in by_case.items():
        if (ours := found.get("CUSTOM")) is None:
            continue
        cells = [f"{found[p]:.2f} | {ours / found[p]:.2f}" if p in found else " | " for p in peers]
        lines.append(f"| {case} | {ours:.2f} | " + " | ".join(cells) + " |")
    return lines


def _kernels(rows: list[dict[str, Any]]) -> list[str]:
    """One line a case, microseconds, ours first; the rate is TB/s for decode, TFLOP/s otherwise."""
    by_case: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["impl"]] = row
    peers = [p for p in PEERS if any(p in found for found in by_case.values())]
    head = ["case", "ours, us", "rate", "error", *(p.replace("_", " ") + ", us" for p in peers)]
    head += ["ours / best peer"] if peers else []
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for case, found in by_case.items():
        ours = found.get("fi")
        if ours is None:
            continue
        cells = [
            case,
            f"{ours['us']:.1f}",
            _rate(ours),
            f"{ours['rel_err']:.1e}" if "rel_err" in ours else "",
        ]
        cells += [f"{found[p]['us']:.1f}" if p in found else "" for p in peers]
        best = min((found[p]["us"] for p in peers if p in found), default=None)
        if peers:
            cells.append(f"{ours['us'] / best:.2f}" if best else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _rate(row: dict[str, Any]) -> str:
    if row["suite"] == "plan":
        return "host"
    return f"{row['tb_s']:.2f} TB/s" if row["suite"] == "decode" else f"{row['tflop_s']:.0f} TFLOP/s"


def replace_block(page: Path, result: dict[str, Any]) -> None:
    """Put the table between its marks in a Markdown file. Raises ValueError if it has none."""
    old, name = page.read_text(), MARKS[is_serving(result)]
    begin, end = f"<!-- {name} figures: begin -->", f"<!-- {name} figures: end -->"
    if begin not in old or end not in old:
        raise ValueError(f"expected the marks {begin!r} and {end!r} in {page}")
    before, rest = old.split(begin, 1)
    page.write_text(f"{before}{begin}\n{table(result)}\n{end}{rest.split(end, 1)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("file", type=Path, help="a results file")
    parser.add_argument("--into", type=Path, help="replace the marked block of this Markdown file")
    args = parser.parse_args()
    result = json.loads(args.file.read_text())
    if args.into is None:
        print(table(result))
        return
    try:
        replace_block(args.into, result)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
