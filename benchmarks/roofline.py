"""Picture: TFLOP/s of every row against the operations per byte of its case, under the card's ceilings."""

from __future__ import annotations

import math
from typing import Any

from . import goals
from .draw import png, pyplot, styles
from .rows import OURS, Result, Row, grouped

TOP = 1800.0  # TFLOP/s
LABELS = 0.29  # of the height


def roofline(result: Result) -> bytes | None:
    """PNG, our points named along the bottom; None without such rows."""
    rows = [row for row in result["rows"] if "tb_s" in row]
    if not rows:
        return None
    figure, axes = pyplot().subplots(figsize=(11, 7.5))
    low, high = min(map(_intensity, rows)) / 3, max(map(_intensity, rows)) * 3
    if goals.CARD in result["meta"]["card"]:
        memory, compute = goals.READ_TB_S, goals.TFLOP_S
        ridge = compute / memory
        axes.plot([low, ridge, high], [low * memory, compute, compute], color="black", linewidth=1.2)
        axes.text(high * 0.9, compute * 1.08, f"{compute:.0f} TFLOP/s", fontsize=9, ha="right")
        axes.text(ridge / 6, compute / 6 * 1.1, f"{memory} TB/s", fontsize=9, ha="right")
    by_impl = grouped(rows, "impl")
    for place, (name, style) in enumerate(styles(rows).items()):
        # side by side: the intensity is the case's, whoever runs it
        x = [_intensity(row) * 1.06**place for row in by_impl[name]]
        y = [row["tflop_s"] for row in by_impl[name]]
        look = {"color": style.color, "label": style.label, "markersize": 6, "zorder": 3 - 0.1 * place}
        axes.plot(x, y, style.marker, **look)
    _name_points(axes, [row for row in rows if row["impl"] in OURS], 0.016 * math.log10(high / low))
    bottom = min(row["tflop_s"] for row in rows)
    floor = (bottom / TOP**LABELS) ** (1 / (1 - LABELS))  # the lowest point stands above the names
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(floor, TOP))
    axes.set(xlabel="operations per byte of least traffic", ylabel="TFLOP/s")
    axes.legend(loc="upper left", fontsize=9)
    axes.grid(alpha=0.3)
    return png(figure)


def _intensity(row: Row) -> float:
    return float(row["tflop_s"] / row["tb_s"])


def _name_points(axes: Any, rows: list[Row], gap: float) -> None:
    """Upright names at the bottom, at least gap decades apart, as near to their points as that allows."""
    rows = sorted(rows, key=lambda row: (round(math.log10(_intensity(row)), 1), row["tflop_s"]))
    up = [math.log10(_intensity(row)) for row in rows]
    down = up[:]
    for i in range(1, len(rows)):
        up[i] = max(up[i], up[i - 1] + gap)
        down[-1 - i] = min(down[-1 - i], down[-i] - gap)
    line = {"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6, "relpos": (0.5, 1)}
    for row, a, b in zip(rows, up, down, strict=True):
        axes.annotate(
            row["case"],
            (_intensity(row), row["tflop_s"]),
            (10 ** ((a + b) / 2), LABELS - 0.05),
            textcoords=axes.get_xaxis_transform(),
            arrowprops={**line, "shrinkA": 0, "shrinkB": 0},
            zorder=1,
            rotation=90,
            ha="center",
            va="top",
            fontsize=7.5,
        )
