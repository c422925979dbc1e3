"""The schedule in a terminal: loads as a histogram, and the items that take longest."""

from __future__ import annotations

import numpy as np

from .schedule import Clock, Schedule

_BINS, _WIDTH, _LARGEST = 10, 50, 5


def text(schedule: Schedule, clocks: list[Clock]) -> str:
    lines = [schedule.summary()]
    for clock in clocks:
        lines += ["", clock.summary(), *clock.notes, *_histogram(clock.load)]
    lines += ["", f"longest items, {clocks[-1].name}", *_longest(schedule, clocks[-1])]
    return "\n".join(lines)


def _histogram(load: np.ndarray) -> list[str]:
    if load.min() == load.max():
        return []
    counts, edges = np.histogram(load, bins=_BINS)
    return [
        f"{edges[i]:10.1f} to {edges[i + 1]:10.1f} {'#' * -(-count * _WIDTH // counts.max())} {count} workers"
        for i, count in enumerate(counts.tolist())
        if count
    ]


def _longest(schedule: Schedule, clock: Clock) -> list[str]:
    took = (clock.end - clock.begin)[: len(schedule.items)]
    order = np.argsort(-took, kind="stable")[:_LARGEST]
    return [f"{took[i]:10.1f} worker {clock.worker[i]}, {schedule.describe(i)}" for i in order]
