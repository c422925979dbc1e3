"""The variants that are measured: their arguments, and the built-in ones as a user would write them."""

from __future__ import annotations

from typing import Any

import torch

from fi_backend.rope import rope_turns
from fi_backend.variants import Argument, Variant, define, parse

from .cases import DOCUMENT, PREFIX, WINDOW, Case

SOFT_CAP = 2.0  # bends logits of random queries and keys
OWN = (
    define("OWN_CAUSAL", keys=("0", "q_pos + 1")),
    define("OWN_WINDOW", Argument("length", "int", at_least=1), keys=("q_pos - length + 1", "q_pos + 1")),
    define("OWN_SOFT_CAP", Argument("cap", "float"), logits="cap * tanh(x / cap)"),
    define("OWN_ALIBI", Argument("slopes", "tensor"), logits="x + slopes[q_head] * (kv_pos - q_pos)"),
    define(
        "OWN_DOCUMENTS",
        Argument("document", "int", at_least=1),
        mask="q_pos // document == kv_pos // document and kv_pos <= q_pos",
    ),
    define("OWN_PREFIX", Argument("prefix", "int"), mask="kv_pos <= q_pos or kv_pos < prefix"),
    define("OWN_SIGMOID", Argument("bias", "float"), weights="sigmoid(x + bias)"),
)


def slopes(case: Case, device: torch.device) -> torch.Tensor:
    """[q_heads]: 2^(-8 (h + 1) / q_heads)."""
    heads = torch.arange(1, case.q_heads + 1, device=device)
    return torch.exp2(-8.0 * heads / case.q_heads)


def with_arguments(case: Case, device: torch.device) -> tuple[Variant, dict[str, Any]]:
    """The case's variant and what it is run with; a sigmoid's bias is -log of the most keys."""
    variant = parse(case.variant)
    bias = -float(torch.tensor(max(case.kv_lens)).log())
    known = {
        "document": DOCUMENT,
        "prefix": PREFIX,
        **dict.fromkeys(("window", "length"), WINDOW),
        **dict.fromkeys(("soft_cap", "cap"), SOFT_CAP),
        **dict.fromkeys(("alibi_slopes", "slopes"), slopes(case, device)),
        **dict.fromkeys(("sigmoid_bias", "bias"), bias),
        "rope_turns": rope_turns(case.head_dim, device=device),
    }
    return variant, {a.name: known[a.name] for a in variant.args}
