"""What both engines' answers say at the terminal: the text on stdout, the figures on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(pieces: Iterable[tuple[str, int]]) -> str:
    """Print an answer as its pieces (text, number of tokens) come; returns the figures in words."""
    tokens, first, start = 0, 0.0, time.monotonic()
    for text, count in pieces:
        print(text, end="", flush=True)
        first = first or time.monotonic()
        tokens += count
    print(flush=True)
    rate = (tokens - 1) / (time.monotonic() - first) if tokens > 1 else 0.0
    return f"{tokens} tokens, the first after {first - start:.2f} s, then {rate:.1f} a second"


def what_ran(engine: str, plans: int, executors: Sequence[str]) -> str:
    """The engine's attention in words. Raises RuntimeError if it made no plan of ours."""
    if plans == 0:
        raise RuntimeError(
            f"expected {engine} to plan with fi_backend, but no plan was made: another backend ran"
        )
    return f"{plans} plans, executor {', '.join(executors)}"
