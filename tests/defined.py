"""Variants of one's own that tests share: all of the language, text, ranges, weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from cases import Case, make

from fi_backend.variants import Argument, define, parse

# a prefix that is visible to all of a request's tokens, causal after it
PREFIX = define(
    "PREFIX_LM",
    Argument("prefix", "tensor", dtype=torch.int32, per="request"),
    mask="kv_pos <= q_pos or kv_pos < prefix[request]",
)
STRIPES = define(
    "STRIPES",
    Argument("block", "int", at_least=1),
    mask="(q_pos - kv_pos) // block % 3 != 1 if kv_pos >= 4 else not (q_pos == 7)",
)
# all of the language that makes numbers
BENT = define(
    "BENT",
    Argument("cap", "float"),
    Argument("slopes", "tensor"),
    logits="cap * tanh(x / cap) + slopes[q_head] * max(kv_pos - q_pos, -20) - sqrt(abs(x)) / 8"
    " + log(1 + exp(-abs(x))) * (1 if q_head % 2 == 0 else min(0.5, 2)) - 1e-3 * request"
    " + 0.01 * (kv_pos - q_pos)",
)
ROOT_OF_DISTANCE = define(
    "ROOT_OF_DISTANCE",
    Argument("rate", "float"),
    text="""
        template <class A>
        FI_HD static auto logits(const A& a, const Row& r) {
          return [rate = a.rate, q_pos = r.q_pos](float x, int32_t kv_pos) {
            int32_t distance = q_pos > kv_pos ? q_pos - kv_pos : 0;
            return x - rate * sqrtf(float(distance));
          };
        }
    """,
    logits=lambda x, q_pos, kv_pos, *, rate, **_: (
        x - rate * (q_pos[:, None] - kv_pos[None, :]).clamp(min=0).to(x.dtype).sqrt()
    ),
)
# documents of equal length, each on its own, and a look back
PAGES = define(
    "PAGES",
    Argument("length", "int", at_least=1),
    Argument("back", "tensor", dtype=torch.int64, per="request"),
    keys=("q_pos // length * length - back[request]", "q_pos + 1"),
)
# weights of either sign, which do not sum up to 1
SHARES = define(
    "SHARES",
    Argument("power", "float"),
    Argument("shrink", "float"),
    weights="max(x, 0) * power - x * exp(-abs(x)) / (1 + shrink * (q_head + 1))",
)
CASE = Case((1, 3, 0, 70, 1), (200, 3, 5, 150, 0), dtype="f32", variant="FULL")
ARGS: dict[str, dict[str, Any]] = {
    "PREFIX_LM+BENT": {
        "prefix": torch.tensor([40, 2, 5, 100, 9], dtype=torch.int32),
        "cap": 2.0,
        "slopes": torch.tensor([0.5, 0.25, 0.1, -0.1]),
    },
    "CAUSAL+STRIPES+ROOT_OF_DISTANCE": {"block": 5, "rate": 0.3},
    "PAGES": {"length": 60, "back": torch.tensor([0, 7, 0, 30, 500])},
    "STRIPES+SHARES": {"block": 2, "power": 0.5, "shrink": 2.0},
}


def inputs_of(name: str, device: str = "cpu", **changes: Any) -> Any:
    inputs = make(replace(CASE, **changes), device)
    inputs.case, inputs.variant = replace(inputs.case, variant=name), parse(name)
    inputs.variant_args = {k: v.to(device) if torch.is_tensor(v) else v for k, v in ARGS[name].items()}
    return inputs
