"""What all pictures of results files share."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

from .rows import OURS, Row, grouped

# ours, then peers as they appear; told apart without colour too
_MARKS = [
    ("#d55e00", "o"),
    *(("#0072b2", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#e69f00", "v")),
    *(("#56b4e9", "P"), ("#555555", "X"), ("#8c510a", "*"), ("#a6a600", "h")),
]


class Style(NamedTuple):
    label: str
    color: str
    marker: str


def styles(rows: list[Row]) -> dict[str, Style]:
    """Of each implementation, ours first."""
    names = sorted(grouped(rows, "impl"), key=lambda name: name not in OURS)
    labels = [{**dict.fromkeys(OURS[:2], "ours"), "fi_flat": "ours, single format"}.get(n, n) for n in names]
    return {name: Style(label, *m) for name, label, m in zip(names, labels, _MARKS, strict=False)}


def pyplot() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SystemExit("expected matplotlib for the pictures, found none: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    pyplot().close(figure)
    return buffer.getvalue()
