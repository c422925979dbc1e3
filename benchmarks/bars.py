"""Picture: our time of every case over its best peer's."""

from __future__ import annotations

from typing import Any

from .draw import Style, png, pyplot, styles
from .rows import OURS, Result, Times, grouped, times

MOST = 3.0  # what a panel shows


def bars(result: Result) -> bytes | None:
    """PNG, a panel for each suite: ours as a bar with its number, peers as marks. None without peers."""
    by_suite = grouped(result["rows"], "suite").items()
    panels = {suite: cases for suite, rows in by_suite if (cases := _compared(times(suite, rows)))}
    if not panels:
        return None
    heights = [len(cases) + 0.8 for cases in panels.values()]
    size = (9, 0.3 * sum(heights) + 0.45 * len(heights) + 0.6)
    options = {"squeeze": False, "layout": "constrained", "height_ratios": heights}
    figure, axes = pyplot().subplots(len(panels), figsize=size, **options)
    known = styles(result["rows"])
    for panel, (suite, cases) in zip(axes.flat, panels.items(), strict=True):
        _panel(panel, suite, cases, known)
    handles = {label: h for p in axes.flat for h, label in zip(*p.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=5, fontsize=9)
    axes.flat[-1].set_xlabel(f"time / best peer's time (marks at {MOST:.0f} lie there or beyond)")
    return png(figure)


def _compared(found: Times) -> Times:
    """Over the best peer's; only cases that ours and a peer ran."""
    ratios: Times = {}
    for case, of_case in found.items():
        peers = [time for name, time in of_case.items() if name not in OURS]
        if peers and len(peers) < len(of_case):
            ratios[case] = {name: time / min(peers) for name, time in of_case.items()}
    return ratios


def _panel(axes: Any, title: str, cases: Times, known: dict[str, Style]) -> None:
    for place, (name, style) in enumerate(known.items()):
        found = [(i, of_case[name]) for i, of_case in enumerate(cases.values()) if name in of_case]
        x = [min(value, MOST) for _, value in found]
        if place == 0:
            axes.barh([i for i, _ in found], x, 0.7, color=style.color, alpha=0.4, label=style.label)
            for i, value in found:
                text = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 8}
                axes.text(1.01, i, f"{value:.2f}", **text)
        elif found:  # marks of one case stand above each other
            y = [i + 0.46 * ((place - 1) / max(1, len(known) - 2) - 0.5) for i, _ in found]
            axes.plot(x, y, style.marker, color=style.color, label=style.label, markersize=5)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), list(cases), fontsize=8)
    axes.set(ylim=(len(cases) - 0.4, -0.6), xlim=(0, None))
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
