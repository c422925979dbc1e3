"""What no adapter takes, whatever its engine: refused while the engine starts, with the reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch

MIN_CAPABILITY = 8
MAX_HEAD_SIZE = 256


def refuse(reason: str) -> NoReturn:
    """Raises NotImplementedError: the engine's user is to choose another backend."""
    raise NotImplementedError(f"fi_backend: {reason}; use another attention backend")


def head_size_step(on_cpu: bool) -> int:
    return 8 if on_cpu else 16


def takes_head_size(size: int, on_cpu: bool) -> bool:
    return 0 < size <= MAX_HEAD_SIZE and size % head_size_step(on_cpu) == 0


def takes_dtype(dtype: torch.dtype, on_cpu: bool) -> bool:
    return dtype in (torch.float16, torch.bfloat16) or (dtype == torch.float32 and on_cpu)


def check_layer(
    *,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    head_dim_vo: int,
    scale: float,
    dtype: torch.dtype,
    on_cpu: bool,
) -> None:
    """The numbers of one attention layer."""
    for name, size in (("head_size", head_dim), ("V head_size", head_dim_vo)):
        if not takes_head_size(size, on_cpu):
            step = head_size_step(on_cpu)
            refuse(f"expected {name} a multiple of {step} up to {MAX_HEAD_SIZE}, got {size}")
    if q_heads < 1 or kv_heads < 1 or q_heads % kv_heads:
        refuse(f"expected query heads a multiple of the {kv_heads} KV heads, got {q_heads}")
    if not 0 < scale < math.inf:
        refuse(f"expected a scale above 0, got {scale}")
    if not takes_dtype(dtype, on_cpu):
        refuse(f"expected float16 or bfloat16{', or float32' if on_cpu else ''}, got {dtype}")


def check_device(device: torch.device | str) -> None:
    """A GPU that no kernel is compiled for. For engines that do not ask by themselves."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and (found := torch.cuda.get_device_capability()[0]) < MIN_CAPABILITY:
        refuse(f"expected a GPU of compute capability {MIN_CAPABILITY}.x or newer, got {found}.x")


def check_cache_dtype(cache: torch.dtype, model: torch.dtype) -> None:
    if cache != model:
        refuse(f"expected a KV cache of the model's dtype {model}, got {cache}")


def refuse_if(asked: Mapping[str, Any]) -> None:
    """Refuses the first reason whose value is true: what the engine asks for."""
    for reason, wanted in asked.items():
        if wanted:
            refuse(reason)


def check_unknown(arguments: Mapping[str, Any]) -> None:
    """Layer arguments that an adapter does not know must be off: an ignored one would be a wrong answer."""
    refuse_if({f"layer argument {k}={v!r} is not supported": not _off(v) for k, v in arguments.items()})


def _off(value: Any) -> bool:
    """-1 is how engines say "off" of a number; 0 is a number."""
    return value is None or value is False or (isinstance(value, int) and value == -1)
