"""KV append by slot mapping, in every layout. The GPU tests run the same check."""

from __future__ import annotations

from dataclasses import replace

import checks
import pytest
import torch
from cases import LAYOUTS, Case, make
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_backend import append


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_append(layout: str, dtype: str) -> None:
    checks.check_append(Case((1,), (150,), page_size=16, layout=layout, dtype=dtype))


def test_append_with_a_narrower_v() -> None:
    checks.check_append(Case((1,), (150,), head_dim=192, head_dim_vo=128, page_size=1, kv_heads=3, q_heads=3))


@settings(max_examples=30, deadline=None)
@given(
    page_size=st.integers(1, 70),
    kv_heads=st.integers(1, 4),
    layout=st.sampled_from(LAYOUTS),
    tokens=st.integers(0, 60),
    seed=st.integers(0, 2**31),
)
def test_append_any(kv_heads: int, tokens: int, **rest) -> None:
    case = Case((1,), (90,), q_heads=kv_heads, kv_heads=kv_heads, head_dim=16, **rest)
    checks.check_append(case, tokens=tokens)


def test_appended_tokens_are_attended_to() -> None:
    case = Case((5,), (37,))
    inputs, truth = make(case), make(case)
    slots = torch.tensor([int(inputs.batch.table[0, p // 16]) * 16 + p % 16 for p in range(32, 37)])
    new = [x[slots // 16, slots % 16].clone() for x in (inputs.kv.k, inputs.kv.v)]
    for cache in (inputs.kv.k, inputs.kv.v):
        cache[slots // 16, slots % 16] = float("nan")
    append(inputs.kv, *new, slots)
    plan = checks.planner_for(inputs).plan(inputs.batch)
    checks.compare(truth, *checks.run_inputs(plan, inputs))


def test_slot_past_the_cache_writes_nothing() -> None:
    kv = make(replace(Case((1,), (20,)), dtype="f32")).kv
    before = kv.k.clone()
    new = torch.ones(2, 2, 64)
    with pytest.raises(ValueError, match=r"expected slots below 64 .*, got 64 for token 1"):
        append(kv, new, new, torch.tensor([16, 64]))
    assert torch.equal(kv.k.nan_to_num(9), before.nan_to_num(9))
