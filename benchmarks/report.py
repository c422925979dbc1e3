"""Results files as Markdown, or as a page with pictures: `python -m benchmarks.report FILE ...`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .page import page
from .rows import Result
from .tables import made, tables


def mark(result: Result) -> str:
    """Which marked block of a page the results belong into."""
    suites = {row["suite"] for row in result["rows"]}
    if suites == {"variants"}:
        return "variant"
    if suites == {"rope"}:
        return "rope"
    if not suites & {"serve", "open loop", "shared prefixes"}:
        return "kernel"
    for suite in ("open loop", "shared prefixes"):
        if suite in suites:
            return suite
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
    parser.add_argument("files", type=Path, nargs="+", help="results files")
    parser.add_argument("--into", type=Path, help="replace the marked blocks of this Markdown file")
    parser.add_argument("--page", type=Path, help="write an HTML page: roofline, bars and tables")
    args = parser.parse_args()
    results = [json.loads(file.read_text()) for file in args.files]
    if args.page is not None:
        args.page.write_text(page(results))
    try:
        for result in results if args.into is not None else ():
            replace_block(args.into, result)
    except ValueError as error:
        parser.error(str(error))
    if args.into is None and args.page is None:
        print("\n\n".join(map(markdown, results)))


if __name__ == "__main__":
    main()
