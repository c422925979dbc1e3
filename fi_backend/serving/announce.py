"""What became of a plugin's registration, in one line: engines hide a plugin's errors, or die of them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from importlib.metadata import version

from .. import env


def announce(engine: str, register: Callable[[], str]) -> None:
    """Runs `register`, which returns the names it took. Never raises: some processes only load plugins."""
    try:
        line = f"fi_backend: registered as {engine} attention backend {register()}"
    except Exception as error:
        line = f"fi_backend: not registered with {engine} ({type(error).__name__}: {error})"
    say_once(line)


def require(distribution: str, oldest: tuple[int, ...]) -> None:
    """Raises RuntimeError if an older version of the engine is installed."""
    found = version(distribution)
    if tuple(map(int, re.findall(r"\d+", found)[: len(oldest)])) < oldest:
        raise RuntimeError(f"expected {distribution} {'.'.join(map(str, oldest))} or newer, got {found}")


def say_once(line: str) -> None:
    """To stderr, unless this process or the one that started it has said the same."""
    # an engine's worker and inspection processes inherit the environment: they speak if they differ
    if os.environ.get(env.ANNOUNCED) != line:
        os.environ[env.ANNOUNCED] = line
        print(line, file=sys.stderr, flush=True)
