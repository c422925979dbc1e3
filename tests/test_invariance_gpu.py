"""Batch invariance of the GPU executor: the CPU's cases."""

from __future__ import annotations

from dataclasses import replace

import checks
import invariance
import pytest
import torch
from cases import Case

pytestmark = pytest.mark.gpu
ALL = invariance.SHAPES + invariance.VARIANTS


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    if torch.cuda.is_available():
        checks.build([*ALL, invariance.ENDS], "cuda", ("bf16", "f16"), batch_invariant=True)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("case", ALL, ids=lambda c: f"{c}-{c.window}")
def test_rows(case: Case, dtype: str) -> None:
    invariance.check_rows(replace(case, dtype=dtype), "cuda")


@pytest.mark.parametrize("head_dims", [(192, 128), (256, 256)], ids=str)
def test_wide_heads(head_dims: tuple[int, int]) -> None:
    invariance.check_rows(replace(invariance.TWO, head_dim=head_dims[0], head_dim_vo=head_dims[1]), "cuda")


@pytest.mark.parametrize("variant", ["CAUSAL", "CAUSAL+SINKS"])
def test_accuracy_at_the_ends_of_chunks(variant: str) -> None:
    checks.check_attention(replace(invariance.ENDS, variant=variant), "cuda", batch_invariant=True)


def test_captured_in_a_graph() -> None:
    """The scratch of the workers has a fixed address, and nothing of an earlier step is left in it."""
    inputs = invariance.make(replace(invariance.TWO, extra_tokens=0), "cuda")
    planner = checks.planner_for(inputs, batch_invariant=True)
    first = checks.run_inputs(planner.plan(inputs.batch), inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = planner.plan(inputs.batch)
        captured = checks.run_inputs(plan, inputs)
    checks.poison(plan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))
