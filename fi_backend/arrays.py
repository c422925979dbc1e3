"""Arrays of other frameworks: whatever has `__dlpack__` becomes a tensor over the same memory, and back."""

from __future__ import annotations

import sys
import threading
from collections import deque
from typing import Any

import torch

Array = Any  # a torch.Tensor, or what another framework calls one
_queued: deque[tuple[torch.cuda.Event, tuple[Any, ...]]] = deque()
_lock = threading.Lock()


def tensor(expected: str, x: Array) -> torch.Tensor:
    """x over the same memory. On a GPU torch's current stream waits for the stream that x was made on.

    expected: how an error begins. Raises TypeError or ValueError for what is no array, or cannot be shared.
    """
    if isinstance(x, torch.Tensor):
        return x
    if not hasattr(x, "__dlpack__"):
        raise TypeError(f"{expected} to be a tensor, got {type(x).__name__}")
    if any(stride < 0 for stride in getattr(x, "strides", None) or ()):  # from_dlpack would end the process
        raise ValueError(f"{expected} with strides of 0 or more, got {list(x.strides)} bytes")
    try:
        return torch.from_dlpack(x)
    except (AttributeError, BufferError, RuntimeError, TypeError) as error:  # JAX tracers have half of DLPack
        kind = f"{type(x).__name__} of {getattr(x, 'dtype', None)}"
        raise TypeError(f"{expected} as an array that DLPack can share, got {kind}: {error}") from error


def writable(expected: str, x: Array) -> torch.Tensor:
    """As `tensor`, for what is written to."""
    if read_only(x):
        immutable = _framework(x).startswith("jax")
        kind = "a JAX array, which is immutable" if immutable else f"a read-only {type(x).__name__}"
        raise ValueError(f"{expected} to be writable, got {kind}")
    return tensor(expected, x)


def read_only(x: Array) -> bool:
    """JAX arrays are immutable; NumPy's have a flag."""
    if isinstance(x, torch.Tensor):
        return False
    return _framework(x).startswith("jax") or not getattr(getattr(x, "flags", None), "writeable", True)


def back(x: torch.Tensor, like: Array) -> Array:
    """x as an array of like's framework, whose stream then waits for torch's current one."""
    if isinstance(like, torch.Tensor):
        return x
    known = hasattr(like, "__array_namespace__")
    return (like.__array_namespace__() if known else sys.modules[_framework(like)]).from_dlpack(x)


def hold(device: torch.device, *arrays: Any) -> None:
    """Keeps arrays until the work queued on the current stream is done.

    A framework that runs on other streams gives memory away as soon as its last array is gone.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return
    event = torch.cuda.Event()
    event.record()
    with _lock:
        _queued.append((event, arrays))
        while _queued and _queued[0][0].query():
            _queued.popleft()


def _framework(x: Array) -> str:
    return type(x).__module__.partition(".")[0]
