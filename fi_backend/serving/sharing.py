"""Whether an engine's planners read shared prefixes once (FI_PREFIX), and what they need for it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import env
from ..jit.toolchain import log
from .own_variant import own_variant

LEVELS = 3  # of a plan: prefixes, prefixes within these, and what they leave
MAX_REQUESTS = 1024  # that a planner with levels takes
MAX_STATE_BYTES = 256 << 20


@dataclass(frozen=True)
class Sharing:
    """What is the same for all planners of an engine.

    requests: max_requests of the planners, or of the smallest and the largest that may be made. tokens: query
    tokens of a request in decode and verify steps; requests with more of them share nothing. max_kv_len: keys
    of the longest request. never: reasons not to share, and whether they hold. own: as AttentionLayer's.
    Raises ValueError for an unknown FI_PREFIX.
    """

    requests: tuple[int, ...]
    tokens: int
    max_kv_len: int
    never: Mapping[str, Any]
    own: str = ""
    mode: str = field(default_factory=env.prefix)

    def levels(self, planner: Mapping[str, Any]) -> int:
        """Of a Planner of these options; 1: nothing is shared."""
        if self.mode == "off" or self._why_not(planner):
            return 1
        return LEVELS if self._state_bytes(planner, LEVELS) <= MAX_STATE_BYTES else 2

    def may(self, planner: Mapping[str, Any]) -> bool:
        """Whether layers of these options may run plans with levels."""
        return any(self.levels({**planner, "max_requests": n}) > 1 for n in self.requests)

    def check(self, planner: Mapping[str, Any]) -> None:
        """As `options` of all planners, when the engine starts."""
        for n in self.requests:
            self.options({**planner, "max_requests": n})

    def options(self, planner: Mapping[str, Any]) -> dict[str, Any]:
        """Further options of a Planner of these. Says once what is done.

        Raises ValueError if FI_PREFIX=on asks for what is not possible.
        """
        if self.mode == "off":
            return {}
        if reason := self._why_not(planner):
            if self.mode == "on":
                raise ValueError(f"expected FI_PREFIX=auto or off where {reason}, got on")
            _say(f"prefixes are not shared where {reason}")
            return {}
        levels = self.levels(planner)
        size = self._state_bytes(planner, levels) / 2**20
        _say(f"shared prefixes are read once: {levels} levels, up to {size:.1f} MiB of partial states")
        return {
            "levels": levels,
            "max_shared_tokens": planner["max_requests"] * self.tokens,
            "max_kv_len": self.max_kv_len,
            "share": "always" if self.mode == "on" else "auto",
        }

    def _why_not(self, planner: Mapping[str, Any]) -> str:
        features = own_variant(self.own)[0].features
        window, requests = planner.get("window"), planner["max_requests"]
        size = self._state_bytes(planner, 2)
        reasons = {
            **self.never,
            "the variant of one's own changes keys or values": any(f.key or f.value for f in features),
            f"layers have a window of {window}": window is not None,
            "plans are batch invariant": planner.get("batch_invariant"),
            "layers are not causal": not planner.get("causal", True),
            f"a batch may have {requests} requests, more than {MAX_REQUESTS}": requests > MAX_REQUESTS,
            f"partial states take {size >> 20} MiB, more than {MAX_STATE_BYTES >> 20}": size
            > MAX_STATE_BYTES,
        }
        return next((reason for reason, holds in reasons.items() if holds), "")

    def _state_bytes(self, planner: Mapping[str, Any], levels: int) -> int:
        """A query token that reads prefixes leaves a partial state, float32, for each level and head."""
        dim = planner.get("head_dim_vo") or planner["head_dim"]
        rows = planner["max_requests"] * self.tokens * planner["q_heads"]
        return int(rows * levels * (dim + 1) * 4)


@functools.cache
def _say(line: str) -> None:
    log().info(line)
