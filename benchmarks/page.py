"""Results files as one HTML page that needs no other file."""

from __future__ import annotations

import base64
from html import escape

from .bars import bars
from .roofline import roofline
from .rows import Result
from .tables import made, tables

_HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>fi_backend: benchmarks</title>
<style>
body { font: 14px/1.4 sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 }
th, td { border-bottom: 1px solid #ccc; padding: 2px 10px; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
img { display: block; max-width: 100%; margin: 1em 0 }
div { overflow-x: auto }
</style>
<h1>Benchmarks</h1>
"""


def page(results: list[Result]) -> str:
    return _HEAD + "\n".join(_section(result) for result in results) + "\n</html>\n"


def _section(result: Result) -> str:
    parts = [f"<h2>{escape(_title(result))}</h2>", f"<p>{escape(made(result))}</p>"]
    for picture, words in ((roofline(result), "roofline"), (bars(result), "time over the best peer's")):
        if picture is not None:
            data = base64.b64encode(picture).decode()
            parts.append(f'<img alt="{words}" src="data:image/png;base64,{data}">')
    for title, head, rows in tables(result):
        parts.append(f"<h3>{escape(title)}</h3>" if title else "")
        parts.append(f"<div><table>{_row('th', head)}")
        parts += [_row("td", cells) for cells in rows]
        parts.append("</table></div>")
    return "\n".join(parts)


def _title(result: Result) -> str:
    engines = [name for key, name in (("vllm", "vLLM"), ("sglang", "SGLang")) if key in result["meta"]]
    return engines[0] if engines else "Kernels"


def _row(tag: str, cells: list[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
