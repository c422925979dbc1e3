"""Pictures of the suite sweep: time against the length of a prefix, and against how many share it."""

from __future__ import annotations

import io
from typing import NamedTuple

from .cases import PLOTTED
from .draw import pyplot, styles
from .rows import Result, Row

Points = dict[str, dict[int, float]]  # implementation, x, microseconds


class Curves(NamedTuple):
    title: str
    changing: str
    along: int  # place in PLOTTED of what changes


FILES = {  # beside the page that shows them
    "prefix-length.svg": Curves(
        "{0} requests that share a prefix, {2} keys of each one's own", "keys of the prefix", 1
    ),
    "prefix-sharers.svg": Curves(
        "a prefix of {1} keys, {2} of each request's own", "requests that share it", 0
    ),
}


def points(rows: list[Row], along: int) -> Points:
    found: Points = {}
    for row in rows:
        if row["suite"] == "sweep":
            sizes = [int(n) for n in row["case"].split("-")[1:]]
            if all(size == PLOTTED[i] for i, size in enumerate(sizes) if i != along):
                found.setdefault(row["impl"], {})[sizes[along]] = row["us"]
    return found


def curves(result: Result) -> dict[str, str]:
    """SVG by file name; nothing without a sweep. What is drawn is in its description, too."""
    rows = result["rows"]
    drawn = {name: points(rows, of_file.along) for name, of_file in FILES.items()}
    return {name: _svg(rows, FILES[name], found) for name, found in drawn.items() if found}


def _svg(rows: list[Row], wanted: Curves, found: Points) -> str:
    plot = pyplot()
    figure, axes = plot.subplots(figsize=(7, 4.2), layout="constrained")
    known = styles([row for row in rows if row["impl"] in found])
    for name, style in known.items():
        x = sorted(found[name])
        line = [found[name][n] for n in x]
        axes.plot(x, line, style.marker + "-", color=style.color, label=style.label, markersize=5)
    ticks = sorted({x for of_impl in found.values() for x in of_impl})
    axes.set(xscale="log", xlabel=wanted.changing, ylabel="a layer, us")
    axes.set_title(wanted.title.format(*PLOTTED), fontsize=10)
    axes.set_xticks(ticks, [str(x) for x in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yscale("log", subs=[2, 5])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(fontsize=9)
    axes.grid(which="both", alpha=0.3)
    buffer = io.StringIO()
    # the same bytes whenever it is drawn
    with plot.rc_context({"svg.hashsalt": "", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Description": description(found)})
    plot.close(figure)
    return buffer.getvalue()


def description(found: Points) -> str:
    lines = (f"{name}: " + ", ".join(f"{x} {found[name][x]}" for x in sorted(found[name])) for name in found)
    return "; ".join(lines)
