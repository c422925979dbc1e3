"""Rotation: frequencies beside transformers', late positions, and keys that a sliding window moves."""

from __future__ import annotations

import math
from typing import Any

import checks
import pytest
import torch
from cases import Case, make

from fi_backend import variants
from fi_backend.rope import rope_scale, rope_turns, rotated

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.0}, LLAMA3, YARN])
def test_frequencies_are_those_of_transformers(scaling: dict[str, Any] | None) -> None:
    transformers = pytest.importorskip("transformers")
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    if scaling is None:
        inverse, factor = 500000.0 ** -(torch.arange(0, 128, 2) / 128), 1.0
    else:
        config = transformers.LlamaConfig(
            hidden_size=1024,
            num_attention_heads=8,
            max_position_embeddings=32768,
            rope_theta=500000.0,
            rope_scaling=dict(scaling),
        )
        inverse, factor = rope_utils.ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    ours = rope_turns(128, 500000.0, scaling).double() * 2 * math.pi / 2**32
    torch.testing.assert_close(ours, inverse.double(), rtol=2e-6, atol=1e-9)
    assert rope_scale(scaling) == pytest.approx(factor**2)


def test_unknown_scaling_is_named() -> None:
    with pytest.raises(ValueError, match="expected rope_type default, linear, llama3 or yarn, got 'dynamic'"):
        rope_turns(64, scaling={"rope_type": "dynamic"})


@pytest.mark.parametrize("interleaved", [False, True])
def test_logits_depend_on_distance_alone(interleaved: bool) -> None:
    q, k, turns = torch.randn(1, 64).double(), torch.randn(1, 64).double(), rope_turns(64)
    dots = []
    for shift in (0, 5, 1_000_000):
        a = rotated(q, torch.tensor([shift + 7]), turns, interleaved)
        b = rotated(k, torch.tensor([shift]), turns, interleaved)
        dots.append(float((a * b).sum()))
    assert dots == pytest.approx([dots[0]] * 3, abs=1e-9)  # exact: whole turns cancel in integers


@pytest.mark.parametrize("name", ["CAUSAL+ROPE", "CAUSAL+ROPE_INTERLEAVED_24", "CAUSAL+QK_NORM+ROPE"])
def test_attention_and_controls(name: str) -> None:
    inputs = make(Case((1, 5, 70), (300, 40, 90), dtype="f32", variant=name))
    plan = checks.planner_for(inputs).plan(inputs.batch)
    out, lse = checks.run_inputs(plan, inputs)
    checks.compare(inputs, out, lse)
    inputs.variant_args["rope_turns"] = inputs.variant_args["rope_turns"].flip(0).contiguous()
    with pytest.raises(AssertionError, match="error"):
        checks.compare(inputs, out, lse)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="expected an even rotary_dim of at least 2, or None, got 7"):
        variants.rope(7)
    with pytest.raises(ValueError, match="expected a name of capitals"):
        variants.define("ROPE_16", mask="True")
    inputs = make(Case((1,), (30,), dtype="f32", variant="CAUSAL+ROPE"))
    plan = checks.planner_for(inputs).plan(inputs.batch)
    inputs.variant_args["rope_turns"] = rope_turns(48)
    with pytest.raises(ValueError, match=r"variant CAUSAL\+ROPE: expected rope_turns of 32 elements, got 24"):
        checks.run_inputs(plan, inputs)
    assert variants.parse("rope_64") is variants.rope(64) and variants.parse("ROPE") is variants.rope()
