"""Bytes of keys and values that were not read again because prefixes are shared: in the log and as a metric.

The metric is the counter `fi_backend_prefix_saved_bytes` of prometheus_client, where that is installed.
"""

from __future__ import annotations

import functools
import time
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..jit.toolchain import log
from ..plan import Planner
from ..prefixes import PrefixFinder

EVERY = 30.0  # seconds between two looks

_next_look = 0.0
_reported = 0


class _Watched:
    """What the finder of a planner has saved; a token is `token_bytes` in all layers that run the plan."""

    def __init__(self, finder: PrefixFinder, token_bytes: int) -> None:
        self.token_bytes = token_bytes
        self.seen = 0  # tokens
        on_gpu = finder.device.type == "cuda"
        self.copied = torch.zeros(1, dtype=torch.int64, pin_memory=True) if on_gpu else finder.saved_in_all


_watched: WeakKeyDictionary[PrefixFinder, _Watched] = WeakKeyDictionary()


def watch(planner: Planner, layers: int, element_bytes: int) -> None:
    """From now on what this planner saves counts. layers: that run its plans. Nothing without levels."""
    if planner.finder is not None:
        dims = planner.head_dim_qk + planner.head_dim_vo
        _watched[planner.finder] = _Watched(planner.finder, planner.kv_heads * dims * element_bytes * layers)
        _counter()


def total() -> int:
    """Bytes that planners of this process, as far as they are alive, have saved until now.

    Waits for the device: for tests and benchmarks.
    """
    return sum(int(finder.saved_in_all) * found.token_bytes for finder, found in _watched.items())


def look() -> None:
    """An adapter calls this in every step. Reports what was copied at the last look, and copies anew."""
    global _next_look, _reported
    now = time.monotonic()
    if now < _next_look or not _watched:
        return
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    _next_look = now + EVERY
    grown = 0
    for finder, found in _watched.items():
        tokens = int(found.copied)  # an older number if the GPU is that late: the next look has the rest
        grown += (tokens - found.seen) * found.token_bytes
        found.seen = tokens
        if found.copied is not finder.saved_in_all:
            found.copied.copy_(finder.saved_in_all, non_blocking=True)
    if grown:
        _reported += grown
        if (counter := _counter()) is not None:
            counter.inc(grown)
        log().info("shared prefixes saved %.3f GB of keys and values so far", _reported / 1e9)


@functools.cache
def _counter() -> Any:
    try:
        from prometheus_client import Counter
    except ImportError:
        return None
    return Counter("fi_backend_prefix_saved_bytes", "Bytes of keys and values that shared prefixes saved")
