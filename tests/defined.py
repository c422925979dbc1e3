"""Variants of one's own that tests share: all of the language, text, ranges, weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from cases import Case, make

from fi_backend.variants import Argument, define, parse

# a prefix that is visible to all of a request's tokens, causal after it
PREFIX = define(
    "PREFIX",
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
# documents that lie one behind the other, a query token's own in part; and every so manieth key
DOCUMENTS = define(
    "DOCUMENTS",
    Argument("document", "tensor", dtype=torch.int32, per="request"),
    mask="q_pos // document[request] == kv_pos // document[request] and kv_pos <= q_pos",
)
STEPS = define("STEPS", Argument("stride", "int", at_least=1), mask="(q_pos - kv_pos) // 16 % stride == 0")
# weights of either sign, which do not sum up to 1
SHARES = define(
    "SHARES",
    Argument("power", "float"),
    Argument("shrink", "float"),
    weights="max(x, 0) * power - x * exp(-abs(x)) / (1 + shrink * (q_head + 1))",
)
# every transform of vectors, and of outputs
GATED = define(
    "GATED",
    Argument("gates", "tensor"),
    Argument("shares", "tensor", per="dim"),
    query="x * shares[dim] + 0.01 * q_head",
    key="x - 0.001 * kv_pos * shares[dim]",
    value="x * (1 + 0.01 * (kv_pos % 7)) + kv_head",
    output="x * gates[q_head] + shares[dim] * q_pos / 100",
)
# tensors per key, and per query token
SEGMENT = define(
    "SEGMENT",
    Argument("segment", "tensor", dtype=torch.uint8, per="key"),
    Argument("valid", "tensor", dtype=torch.bool, per="key"),
    mask="segment[q_pos] - segment[kv_pos] == 0 and valid[kv_pos] or kv_pos < q_len // 8",
)
IMPORTANCE = define(
    "IMPORTANCE",
    Argument("importance", "tensor", per="key"),
    Argument("temperature", "tensor", per="token"),
    logits="x / temperature[q_token] + importance[kv_pos] - 0.1 * importance[q_pos]",
)
# an index of its own; executors ask for keys past kv_len too
LOOK_UP = define(
    "LOOK_UP",
    Argument("table", "tensor", per="word"),
    text="""
        template <class A>
        FI_HD static auto logits(const A& a, const Row& r) {
          const auto table = a.table;
          const int32_t kv_len = r.kv_len;
          return [=](float x, int32_t kv_pos) { return kv_pos < kv_len ? x + table[kv_pos / 50] : x; };
        }
    """,
    logits=lambda x, q_pos, kv_pos, *, table, **_: x + table[kv_pos // 50],
)
CASE = Case((1, 3, 0, 70, 1), (200, 3, 5, 150, 0), dtype="f32", variant="FULL")
ARGS: dict[str, dict[str, Any]] = {
    "PREFIX+BENT": {
        "prefix": torch.tensor([40, 2, 5, 100, 9], dtype=torch.int32),
        "cap": 2.0,
        "slopes": torch.tensor([0.5, 0.25, 0.1, -0.1]),
    },
    "CAUSAL+STRIPES+ROOT_OF_DISTANCE": {"block": 5, "rate": 0.3},
    "PAGES": {"length": 60, "back": torch.tensor([0, 7, 0, 30, 500])},
    "STRIPES+SHARES": {"block": 2, "power": 0.5, "shrink": 2.0},
    "CAUSAL+GATED": {
        "gates": torch.tensor([0.5, -1.0, 2.0, 0.1]),
        "shares": torch.linspace(-1, 1.5, 64),
    },
    "SEGMENT+IMPORTANCE": {
        "segment": torch.arange(5 * 200, dtype=torch.uint8).view(5, 200) // 32,
        "valid": torch.arange(5 * 200).view(5, 200) % 7 != 3,
        "importance": torch.linspace(-1, 1, 5 * 200).view(5, 200),
        "temperature": torch.linspace(0.5, 2, 200),
    },
}


# what a build that checks indices is tested with: every kind of tensor, the last request the longest
CHECKED: dict[str, Any] = {"q_lens": (3, 0, 70, 1, 2), "kv_lens": (3, 5, 150, 0, 200), "dtype": "bf16"}
ARGS_CHECKED = {
    "SEGMENT+LOOK_UP+IMPORTANCE": ARGS["SEGMENT+IMPORTANCE"] | {"table": torch.tensor([0.5, -0.5, 0.2, 1.0])}
}


def inputs_of(name: str, device: str = "cpu", **changes: Any) -> Any:
    inputs = make(replace(CASE, **changes), device)
    inputs.case, inputs.variant = replace(inputs.case, variant=name), parse(name)
    inputs.variant_args = {
        k: v.to(device) if torch.is_tensor(v) else v for k, v in (ARGS | ARGS_CHECKED)[name].items()
    }
    if "shares" in inputs.variant_args:
        inputs.variant_args["shares"] = torch.linspace(-1, 1.5, inputs.case.head_dim, device=device)
    return inputs
