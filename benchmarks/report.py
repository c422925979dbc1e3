"""The table of a results file: `python -m benchmarks.report FILE [--into README.md]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- kernel figures: begin -->", "<!-- kernel figures: end -->"
PEERS = ("fa3", "flashinfer_fa3", "flashinfer_fa2", "flashinfer_decode", "flashinfer_persistent")


def table(result: dict[str, Any]) -> str:
    """Markdown: one line a case, microseconds, ours first; the rate is TB/s for decode, TFLOP/s otherwise."""
    by_case: dict[str, dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        by_case.setdefault(row["case"], {})[row["impl"]] = row
    peers = [p for p in PEERS if any(p in rows for rows in by_case.values())]
    head = ["case", "ours, us", "rate", "error", *(p.replace("_", " ") + ", us" for p in peers)]
    head += ["ours / best peer"] if peers else []
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for case, rows in by_case.items():
        ours = rows.get("fi")
        if ours is None:
            continue
        cells = [
            case,
            f"{ours['us']:.1f}",
            _rate(ours),
            f"{ours['rel_err']:.1e}" if "rel_err" in ours else "",
        ]
        cells += [f"{rows[p]['us']:.1f}" if p in rows else "" for p in peers]
        best = min((rows[p]["us"] for p in peers if p in rows), default=None)
        if peers:
            cells.append(f"{ours['us'] / best:.2f}" if best else "")
        lines.append("| " + " | ".join(cells) + " |")
    m = result["meta"]
    lines += [
        "",
        f"{m['card']}, driver {m['driver'] or 'none'}, torch {m['torch']}, {m['date']}, "
        f"commit {m['commit'][:12]}.",
    ]
    return "\n".join(lines)


def _rate(row: dict[str, Any]) -> str:
    if row["suite"] == "plan":
        return "host"
    return f"{row['tb_s']:.2f} TB/s" if row["suite"] == "decode" else f"{row['tflop_s']:.0f} TFLOP/s"


def replace_block(page: Path, text: str) -> None:
    """Put `text` between the marks of a Markdown file. Raises ValueError if it has none."""
    old = page.read_text()
    if BEGIN not in old or END not in old:
        raise ValueError(f"expected the marks {BEGIN!r} and {END!r} in {page}")
    before, rest = old.split(BEGIN, 1)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("file", type=Path, help="a results file")
    parser.add_argument("--into", type=Path, help="replace the marked block of this Markdown file")
    args = parser.parse_args()
    text = table(json.loads(args.file.read_text()))
    if args.into is None:
        print(text)
        return
    try:
        replace_block(args.into, text)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
