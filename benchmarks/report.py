"""Results files as Markdown, or as a page with pictures: `python -m benchmarks.report FILE ...`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import curves
from .cases import SUITES
from .page import page
from .rows import Result, grouped
from .tables import made, tables


def blocks(result: Result, text: str) -> dict[str, Result]:
    """The results by marked block of a page: kernel suites share one, where they have none of their own."""
    found: dict[str, Result] = {}
    for suite, rows in grouped(result["rows"], "suite").items():
        name = suite
        if suite in ("serve", "shared prefixes"):
            name = ("sglang " if "sglang" in result["meta"] else "") + suite.replace("serve", "serving")
        elif suite in (*SUITES, "jit") and _marks(suite)[0] not in text:
            name = "kernel"
        found.setdefault(name, result | {"rows": []})["rows"].extend(rows)
    return found


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} figures: begin -->", f"<!-- {name} figures: end -->"


def markdown(result: Result) -> str:
    lines = []
    for title, head, rows in tables(result):
        lines += [f"**{title}**", ""] if title else []
        lines += ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
        lines.append("")
    return "\n".join([*lines, made(result)])


def replace_blocks(page: Path, result: Result) -> None:
    """Put the tables between their marks in a Markdown file, and pictures beside it where it shows them.

    Raises ValueError if it has no marks.
    """
    text = page.read_text()
    for name, of_block in blocks(result, text).items():
        begin, end = _marks(name)
        if begin not in text or end not in text:
            raise ValueError(f"expected the marks {begin!r} and {end!r} in {page}")
        before, rest = text.split(begin, 1)
        text = f"{before}{begin}\n{markdown(of_block)}\n{end}{rest.split(end, 1)[1]}"
    page.write_text(text)
    if any(f"({name})" in text for name in curves.FILES):
        for name, picture in curves.curves(result).items():
            page.with_name(name).write_text(picture)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="results files")
    parser.add_argument(
        "--into", type=Path, help="replace the marked blocks and the pictures of this Markdown file"
    )
    parser.add_argument("--page", type=Path, help="write an HTML page: roofline, bars and tables")
    args = parser.parse_args()
    results = [json.loads(file.read_text()) for file in args.files]
    if args.page is not None:
        args.page.write_text(page(results))
    try:
        for result in results if args.into is not None else ():
            replace_blocks(args.into, result)
    except ValueError as error:
        parser.error(str(error))
    if args.into is None and args.page is None:
        print("\n\n".join(map(markdown, results)))


if __name__ == "__main__":
    main()
