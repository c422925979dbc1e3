"""Open loop: requests arrive as a Poisson process, however many are still being served, and latencies count.

TTFT: arrival to first token; ITL: between two outputs of a request; TPOT: mean time of its later tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

import numpy as np

# starts the request of this number; yields how many tokens each of its outputs adds
Send = Callable[[int], AsyncIterator[int]]


class Served(NamedTuple):
    """Seconds on one clock; one time for each output, which may hold several tokens."""

    arrival: float
    times: list[float]
    tokens: int


def arrivals(requests: int, rate: float, seed: int = 0) -> list[float]:
    """Seconds from the beginning; `rate` requests a second on average."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, requests)
    return [float(t) for t in gaps.cumsum()]


async def drive(send: Send, at: list[float]) -> list[Served]:
    """Starts request i at its time at[i] from now on and waits for all."""
    begin = time.perf_counter()

    async def one(number: int, arrival: float) -> Served:
        await asyncio.sleep(max(0.0, begin + arrival - time.perf_counter()))
        times, tokens = [], 0
        async for added in send(number):
            times.append(time.perf_counter() - begin)
            tokens += added
        # from the time it was due: a client that falls behind must not hide the wait
        return Served(arrival, times, tokens)

    return await asyncio.gather(*(one(number, arrival) for number, arrival in enumerate(at)))


def figures(served: list[Served]) -> dict[str, float]:
    """Percentiles in milliseconds, and what was served a second until the last request ended."""
    latencies = {
        "ttft": [s.times[0] - s.arrival for s in served],
        "tpot": [(s.times[-1] - s.times[0]) / (s.tokens - 1) for s in served if s.tokens > 1],
        "itl": [gap for s in served for gap in np.diff(s.times)],
    }
    found = {
        f"{name}_ms_p{percent}": round(1000 * float(np.percentile(values, percent)), 2)
        for name, values in latencies.items()
        for percent in (50, 99)
    }
    seconds = max(s.times[-1] for s in served)
    found["requests_s"] = round(len(served) / seconds, 2)
    found["tokens_s"] = round(sum(s.tokens for s in served) / seconds, 1)
    return found
