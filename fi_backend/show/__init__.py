"""What a plan looks like: `Plan.show`, and `python -m fi_backend.show` for lengths typed in."""

from __future__ import annotations

from pathlib import Path

from ..measure import Times
from ..plan import Plan
from .schedule import Schedule
from .svg import svg
from .text import text


def show(plan: Plan, path: str | Path | None = None, times: Times | None = None) -> str:
    if path is not None and Path(path).suffix != ".svg":
        raise ValueError(f"expected a path ending in .svg, got {path}")
    schedule = Schedule(plan)
    clocks = [schedule.predicted()]
    if times is not None:
        clocks.append(schedule.measured(times))
    if path is not None:
        Path(path).write_text(svg(schedule, clocks), encoding="utf-8")
    return text(schedule, clocks)
