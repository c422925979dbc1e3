"""The schedule as one SVG: a panel for each clock, in it a row for each worker, in it the worker's items."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

import numpy as np

from .schedule import Clock, Schedule

_WIDTH, _MARGIN, _TOP = 1360, 48, 128  # px
_HEIGHT, _ROW = 900, (2.0, 14.0)  # of all rows if one of them then has a height within these bounds
_SHADES = {  # neighbours on the cost line differ: by request, modulo 3
    "decode": ("#1f5fa8", "#4f94d4", "#93c0ec"),
    "prefill": ("#c25a08", "#ee8a2c", "#f9bd7c"),
    "merge": ("#2e8b57",) * 3,
}
_STYLE = (
    "text{font:11px sans-serif;fill:#333}.b{font-weight:bold;font-size:13px}.r{fill:#c00}"
    "rect:hover{stroke:#000;stroke-width:1}.m{stroke:#c00;stroke-dasharray:4 3}.g{stroke:#ddd}"
)


def svg(schedule: Schedule, clocks: list[Clock]) -> str:
    row = min(max(_HEIGHT / schedule.workers, _ROW[0]), _ROW[1])
    width = (_WIDTH - _MARGIN) / len(clocks)
    height = _TOP + row * schedule.workers + 34
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}">',
        f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>',
        f'<text class="b" x="{_MARGIN}" y="22">{escape(schedule.summary())}</text>',
        *_legend(),
        *_workers(schedule.workers, row),
    ]
    for n, clock in enumerate(clocks):
        lines += [f'<g transform="translate({_MARGIN + n * width:.1f} {_TOP})">']
        lines += [*_panel(schedule, clock, width - 80, row), "</g>"]
    return "\n".join([*lines, "</svg>\n"])


def _legend() -> Iterator[str]:
    for n, (kind, shades) in enumerate(_SHADES.items()):
        for i, shade in enumerate(shades):
            yield f'<rect x="{_MARGIN + 120 * n + 9 * i}" y="31" width="9" height="9" fill="{shade}"/>'
        yield f'<text x="{_MARGIN + 120 * n + 32}" y="40">{kind}</text>'
    x = _MARGIN + 360
    yield f'<path class="m" d="M{x} 36h24"/><text x="{x + 30}" y="40">mean load</text>'
    yield f'<text x="{x + 120}" y="40">a row is a worker; shades tell requests apart; point at an item</text>'


def _workers(workers: int, row: float) -> Iterator[str]:
    step = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200) if n * row >= 12)
    for worker in range(0, workers, step):
        y = _TOP + row * (worker + 0.5) + 4
        yield f'<text x="{_MARGIN - 6}" y="{y:.1f}" text-anchor="end">{worker}</text>'


def _panel(schedule: Schedule, clock: Clock, width: float, row: float) -> Iterator[str]:
    most = float(max(clock.end.max(initial=0), 1e-9))
    scale, bottom = width / most, row * schedule.workers
    head, *lines = *clock.summary().split(": ", 1), *clock.notes
    yield f'<text y="-66" class="b">{escape(head)}</text>'
    yield from (f'<text y="{14 * n - 50}">{escape(line)}</text>' for n, line in enumerate(lines))
    for tick in _ticks(most):
        x = tick * scale
        yield f'<path class="g" d="M{x:.1f} -4V{bottom + 4:.1f}"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{tick:g}</text>'
    begins, widths = clock.begin * scale, (clock.end - clock.begin) * scale
    items, requests = len(schedule.items), [*schedule.items[:, 0], *schedule.merges[:, 0]]
    bar = row - (0.5 if row < 5 else 1)
    for i, (x, wide, worker) in enumerate(zip(begins, widths, clock.worker, strict=True)):
        kind = "merge" if i >= items else "prefill" if schedule.prefill[i] else "decode"
        took = f"worker {worker}, {clock.begin[i]:g} to {clock.end[i]:g}"
        yield (
            f'<rect x="{x:.2f}" y="{worker * row:.2f}" width="{max(wide - 0.3, 0.4):.2f}" height="{bar:.2f}" '
            f'fill="{_SHADES[kind][requests[i] % 3]}"><title>{schedule.describe(i)}; {took}</title></rect>'
        )
    mean, busiest = clock.load.mean() * scale, int(clock.load.argmax())
    x = float(clock.end[clock.worker == busiest].max(initial=0)) * scale
    yield f'<path class="m" d="M{mean:.1f} -4V{bottom + 4:.1f}"/>'
    yield f'<text class="r" x="{x + 4:.1f}" y="{row * (busiest + 0.5) + 4:.1f}">busiest: {busiest}</text>'


def _ticks(most: float) -> np.ndarray:
    power = 10.0 ** np.floor(np.log10(most))
    step = next(power * part for part in (0.1, 0.2, 0.5, 1) if most / (power * part) <= 10)
    return np.arange(0, most + step / 1000, step)
