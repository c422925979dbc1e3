"""Rotary position embedding: how far each pair of elements turns from one position to the next.

A share of a turn is counted in 2^-32 of it, as an int32: whole turns then cancel without rounding, and late
positions are rotated as exactly as early ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

_TURN = 1 << 32


def rope_turns(
    rotary_dim: int,
    base: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """int32 [rotary_dim / 2], the argument rope_turns of the variants that `variants.rope` makes.

    scaling: a model's rope_scaling as its config.json has it, of rope_type "default", "linear", "llama3" or
    "yarn". Raises ValueError for another type, KeyError for one that lacks a number.
    """
    pairs = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    radians = _scaled(base**-pairs, rotary_dim, base, scaling or {"rope_type": "default"})
    turns = (radians / (2 * math.pi) * _TURN).round().to(torch.int64) % _TURN
    return (turns - (turns >= _TURN // 2) * _TURN).to(device, torch.int32)


def rope_scale(scaling: Mapping[str, Any] | None) -> float:
    """What YaRN multiplies logits by, as a factor of `run`'s scale; 1 for other types."""
    if scaling is None or _type(scaling) != "yarn":
        return 1.0
    found = scaling.get("attention_factor")
    return (0.1 * math.log(scaling["factor"]) + 1.0 if found is None else found) ** 2


def rotated(
    x: torch.Tensor, positions: torch.Tensor, turns: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """x [.., tokens, head_dim] at positions [tokens], in x's dtype. Eager, for the oracle."""
    width = 2 * len(turns)
    angles = (positions.long()[:, None] * turns.long() % _TURN).double() * (2 * math.pi / _TURN)
    cosine, sine = (f(angles).to(x.dtype) for f in (torch.cos, torch.sin))
    parts = x[..., :width].unflatten(-1, (-1, 2) if interleaved else (2, -1))
    pair = -1 if interleaved else -2
    first, second = parts.unbind(pair)
    turned = torch.stack((first * cosine - second * sine, second * cosine + first * sine), pair)
    return torch.cat((turned.flatten(-2), x[..., width:]), -1)


def _type(scaling: Mapping[str, Any]) -> Any:
    return scaling.get("rope_type", scaling.get("type"))


def _scaled(radians: torch.Tensor, width: int, base: float, scaling: Mapping[str, Any]) -> torch.Tensor:
    match _type(scaling):
        case "default":
            return radians
        case "linear":
            return radians / scaling["factor"]
        case "llama3":
            # long wavelengths are stretched, short ones kept, those between blended
            turns = scaling["original_max_position_embeddings"] * radians / (2 * math.pi)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            return radians * (keep + (1 - keep) / scaling["factor"])
        case "yarn":
            length = scaling["original_max_position_embeddings"]

            def pair_of(turns: float) -> float:  # that makes so many turns within the original length
                return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

            low = max(math.floor(pair_of(scaling.get("beta_fast") or 32)), 0)
            high = min(math.ceil(pair_of(scaling.get("beta_slow") or 1)), width - 1)
            ramp = (torch.arange(len(radians), dtype=torch.float64) - low) / max(high - low, 0.001)
            keep = 1 - ramp.clamp(0, 1)
            return radians * (keep + (1 - keep) / scaling["factor"])
    raise ValueError(f"expected rope_type default, linear, llama3 or yarn, got {_type(scaling)!r}")
