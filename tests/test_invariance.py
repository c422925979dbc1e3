"""Batch invariance of the CPU executor."""

from __future__ import annotations

from dataclasses import replace

import checks
import hypothesis.strategies as st
import invariance
import pytest
from cases import Case
from hypothesis import given, settings


@pytest.mark.parametrize("case", invariance.SHAPES, ids=str)
def test_shapes(case: Case) -> None:
    invariance.check_rows(case)


@pytest.mark.parametrize("case", invariance.VARIANTS, ids=lambda c: f"{c}-{c.window}")
def test_variants(case: Case) -> None:
    invariance.check_rows(case)


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(1, 130),
    before=st.one_of(st.integers(0, 300), st.integers(invariance.CHUNK - 70, 2 * invariance.CHUNK + 70)),
    group=st.integers(1, 9),
    window=st.one_of(st.integers(1, 200), st.integers(1900, 4300)),
    page_size=st.sampled_from((1, 16)),
    seed=st.integers(0, 2**31),
)
def test_any_length(tokens: int, before: int, group: int, **rest: int) -> None:
    case = Case((tokens,), (before + tokens,), q_heads=group, kv_heads=1, variant="CAUSAL+WINDOW", **rest)
    invariance.check_rows(case)


@pytest.mark.parametrize("variant", ["CAUSAL", "CAUSAL+SINKS"])
def test_accuracy_at_the_ends_of_chunks(variant: str) -> None:
    checks.check_attention(replace(invariance.ENDS, variant=variant), batch_invariant=True)


def test_other_plans_are_noticed() -> None:
    with pytest.raises(AssertionError, match="in a step of 1"):
        invariance.check_rows(invariance.TWO, batch_invariant=False)
