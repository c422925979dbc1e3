"""Engines that start together and take turns: their imports, which nobody measures, run side by side."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .engine_process import EngineProcess, say

MARGIN = 10.0  # seconds: an engine stops by itself before it is stopped


def exit_code(code: int) -> str:
    return f"exit code {code}" if code else ""


@dataclass
class Contender:
    """A child process that waits for its turn by wait_for_turn(gate).

    fail: hears why there are no (more) figures; problem: of an exit code, what is wrong, "" if nothing is.
    """

    name: str
    process: EngineProcess
    gate: Path
    fail: Callable[[str], None]
    problem: Callable[[int], str] = exit_code

    def run(self, seconds: float) -> None:
        """Its turn, of at most `seconds`."""
        partial = self.gate.with_suffix(".partial")
        partial.write_text(f"{seconds - MARGIN:.0f}")
        partial.rename(self.gate)
        if reason := self.problem(self.process.wait(seconds)):
            self.fail(reason)


def take_turns(
    contenders: list[Contender],
    end: float,
    least: float,
    share: Callable[[float, int], float] = lambda left, engines: 1.5 * left / engines,
) -> None:
    """One after the other until `end`, by time.monotonic(); without those that had less than `least` seconds.

    share: of the seconds left to so many engines, those of the next one.
    """
    try:
        for place, contender in enumerate(contenders):
            left = end - time.monotonic()
            if left < least:
                contender.fail("no time left")
                continue
            seconds = min(left, share(left, len(contenders) - place))
            say(f"{contender.name}: at most {seconds:.0f} s ...")
            contender.run(seconds)
    finally:
        for contender in contenders:
            contender.process.stop()


# ---- in the child


def wait_for_turn(gate: Path) -> None:
    """Until the gate is there. Ends the process if its parent has ended."""
    parent = os.getppid()
    while not gate.exists():
        if os.getppid() != parent:
            sys.exit(1)
        time.sleep(0.05)


def begin(gate: Path) -> float:
    """When the turn began, by time.time()."""
    return gate.stat().st_mtime


def deadline(gate: Path) -> float:
    """When the turn ends, by time.monotonic()."""
    return time.monotonic() + float(gate.read_text()) - (time.time() - begin(gate))
