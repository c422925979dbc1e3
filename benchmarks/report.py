"""A results file as Markdown: `python -m benchmarks.report FILE [--into README.md]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .tables import Result, made, tables


def mark(result: Result) -> str:
    """Which marked block of the README the results belong into."""
    if all(row["suite"] != "serve" for row in result["rows"]):
        return "kernel"
    return "sglang serving" if "sglang" in result["meta"] else "serving"


def markdown(result: Result) -> str:
    lines = []
    for title, head, rows in tables(result):
        lines += [f"**{title}**", ""] if title else []
        lines += ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
        lines.append("")
    return "\n".join([*lines, made(result)])


def replace_block(page: Path, result: Result) -> None:
    """Put the tables between their marks in a Markdown file. Raises ValueError if it has none."""
    old, name = page.read_text(), mark(result)
    begin, end = f"<!-- {name} figures: begin -->", f"<!-- {name} figures: end -->"
    if begin not in old or end not in old:
        raise ValueError(f"expected the marks {begin!r} and {end!r} in {page}")
    before, rest = old.split(begin, 1)
    page.write_text(f"{before}{begin}\n{markdown(result)}\n{end}{rest.split(end, 1)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("file", type=Path, help="a results file")
    parser.add_argument("--into", type=Path, help="replace the marked block of this Markdown file")
    args = parser.parse_args()
    result = json.loads(args.file.read_text())
    if args.into is None:
        print(markdown(result))
        return
    try:
        replace_block(args.into, result)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
