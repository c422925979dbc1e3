"""The table of a results file: `python -m benchmarks.report FILE [--into README.md]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

OURS = ("CUSTOM", "fi", "fi-page64")  # our rows among whole engines, by the name the engine knows
PEERS = ("fa3", "flashinfer_fa3", "flashinfer_fa2", "flashinfer_decode", "flashinfer_persistent")


def mark(result: dict[str, Any]) -> str:
    """Which marked block of the README the results belong into."""
    if all(row["suite"] != "serve" for row in result["rows"]):
        return "kernel"
    return "sglang serving" if "sglang" in result["meta"] else "serving"


def table(result: dict[str, Any]) -> str:
    """Markdown of a results file: whole engines in seconds, or kernels in microseconds."""
    m = result["meta"]
    made = [m["card"], f"driver {m['driver'] or 'none'}", f"torch {m['torch']}"]
    made += [f"{name} {m[key]}" for key, name in (("vllm", "vLLM"), ("sglang", "SGLang")) if key in m]
    made += [m["date"], f"commit {m['commit'][:12]}"]
    body = _kernels(result["rows"]) if mark(result) == "kernel" else _serving(result["rows"])
    return "\n".join([*body, "", ", ".join(made) + "."])


def _serving(rows: list[dict[str, Any]]) -> list[str]:
    """One line a case, seconds of ours and of its peers, and the ratio of our first column.

    The first engine of a run also warms the machine for the others: its start is in the file, not here.
    A start of ours that builds all kernels stands beside the peer's warm one.
    """
    by_case: dict[str, dict[str, float]] = {}
    for row in rows:
        if "seconds" not in row or row["case"] == "start-up, first":
            continue
        cases = [row["case"]]
        if row["case"] == "start-up, warm" and row["impl"] not in OURS:
            cases.append("start-up, cold")
        for case in cases:
            by_case.setdefault(case, {})[row["impl"]] = row["seconds"]
    if "start-up, cold" in by_case:
        by_case["start-up, our kernels built from nothing"] = by_case.pop("start-up, cold")
    impls = dict.fromkeys(row["impl"] for row in rows if "seconds" in row)
    ours, *others = [name for name in OURS if name in impls]
    peers = [name for name in impls if name not in OURS]
    head = ["case", "ours, s", *(f"ours, {name.partition('-')[2]}, s" for name in others)]
    for p in peers:
        head += [f"{p}, s", f"ours / {p}"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for case, found in by_case.items():
        if ours not in found:
            continue
        cells = [f"{found[name]:.2f}" if name in found else "" for name in (ours, *others)]
        for p in peers:
            cells += [f"{found[p]:.2f}", f"{found[ours] / found[p]:.2f}"] if p in found else ["", ""]
        lines.append("| " + " | ".join([case, *cells]) + " |")
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
    old, name = page.read_text(), mark(result)
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
