"""Engines that start together and take turns: their imports, which nobody measures, run side by side."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from .engine_process import EngineProcess

MARGIN = 10.0  # seconds: an engine stops by itself before it is stopped


class Contender:
    """A child process, started now; it waits for its turn by wait_for_turn(). See EngineProcess."""

    def __init__(
        self,
        command: list[str],
        gate: Path,
        receive: Callable[[dict[str, Any]], None],
        environment: dict[str, str],
        errors: IO[str] | None = None,
    ) -> None:
        self._gate = gate
        self._process = EngineProcess([*command, "--gate", str(gate)], receive, environment, errors)

    def run(self, seconds: float) -> int:
        """Its turn, of at most `seconds`. Returns its exit code."""
        partial = self._gate.with_suffix(".partial")
        partial.write_text(f"{seconds - MARGIN:.0f}")
        partial.rename(self._gate)
        return self._process.wait(seconds)

    def stop(self) -> None:
        self._process.stop()


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
