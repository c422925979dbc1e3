"""The CPU executor against the oracle."""

from __future__ import annotations

from dataclasses import replace

import checks
import hypothesis.strategies as st
import pytest
import torch
from cases import LAYOUTS, TABLES, Case, make
from grid import FUNCTIONS, LONG, MIXED, PIECES, SHAPES, TREE, TREES
from hypothesis import HealthCheck, given, settings

from fi_backend import KVCache, eager, run


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case: Case) -> None:
    checks.check_attention(case)


@pytest.mark.parametrize("case", FUNCTIONS, ids=lambda c: f"{c}-{c.window}")
def test_functions(case: Case) -> None:
    checks.check_attention(case)


@pytest.mark.parametrize("variant", ["CAUSAL", "CAUSAL+WINDOW+SINKS"])
def test_float32(variant: str) -> None:
    checks.check_attention(replace(LONG, dtype="f32", variant=variant))


@pytest.mark.parametrize("workers", [1, 2, 7, 64, 512])
def test_any_number_of_workers(workers: int) -> None:
    checks.check_attention(replace(LONG, variant="CAUSAL+WINDOW+SINKS", window=700), workers=workers)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("workers", [1, 7, 64, 512])
def test_pieces_of_a_tree(workers: int, batch_invariant: bool) -> None:
    """With pieces in which some rows see no key at all."""
    checks.check_attention(PIECES, workers=workers, batch_invariant=batch_invariant)


def test_pieces_without_a_visible_key() -> None:
    inputs = make(PIECES)
    plan = checks.planner_for(inputs, batch_invariant=True).plan(inputs.batch)
    checks.poison(plan)
    checks.run_inputs(plan, inputs)
    assert (plan.partial_lse == -torch.inf).any()


@pytest.mark.parametrize("case", [t for t in TREES if t.tree == "random" and "CAUSAL" in t.variant], ids=str)
def test_a_tree_without_branches_is_causal(case: Case) -> None:
    checks.check_chain(case)


def test_keys_of_a_tree_with_garbage_in_hidden_values() -> None:
    """A hidden key weighs exactly 0: its value may be anything finite, and its key even NaN."""
    inputs = make(replace(TREE, q_lens=(2,), kv_lens=(2,), tree="blind"))
    out = []
    for key, value in ((1.0, 1.0), (float("nan"), 3e38)):
        inputs.variant_args["tree_mask"] = torch.tensor([1, 1, 0, 0])
        page = int(inputs.batch.table[0, 0])
        inputs.kv.k[page, 1], inputs.kv.v[page, 1] = key, value
        plan = checks.planner_for(inputs).plan(inputs.batch)
        out.append(checks.run_inputs(plan, inputs))
    assert all(torch.equal(a[:2], b[:2]) for a, b in zip(*out, strict=True))


lengths = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 400)), min_size=0, max_size=4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=lengths,
    group=st.integers(1, 18),
    kv_heads=st.integers(1, 3),
    page_size=st.integers(1, 70),
    layout=st.sampled_from(LAYOUTS),
    table=st.sampled_from(TABLES),
    variant=st.sampled_from(["FULL", "CAUSAL", "CAUSAL+WINDOW+SINKS"]),
    window=st.integers(1, 200),
    workers=st.integers(1, 40),
    batch_invariant=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_batch(lengths, group, kv_heads, workers, batch_invariant, **rest) -> None:
    q_lens, kv_lens = zip(*lengths, strict=True) if lengths else ((), ())
    case = Case(q_lens, kv_lens, q_heads=group * kv_heads, kv_heads=kv_heads, head_dim=32, **rest)
    checks.check_attention(case, workers=workers, batch_invariant=batch_invariant)


@pytest.mark.parametrize("case", [MIXED, LONG], ids=str)
def test_bitwise_repeatable(case: Case) -> None:
    checks.check_repeats(case)


@pytest.mark.parametrize("variant", ["CAUSAL", "CAUSAL+WINDOW+SINKS"])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_lengths_below_the_planned_ones(variant: str, batch_invariant: bool) -> None:
    checks.check_upper_bound(replace(LONG, variant=variant), batch_invariant=batch_invariant)


def test_planned_wider_than_the_variant() -> None:
    """A plan that keeps all keys serves every variant."""
    checks.check_attention(replace(LONG, variant="CAUSAL+WINDOW"), causal=False, window=None)
    checks.check_attention(replace(LONG, variant="CAUSAL+WINDOW"), window=60)


def test_a_whole_tile_needs_no_partial_state() -> None:
    inputs = make(LONG)
    plan = checks.planner_for(inputs, workers=1).plan(inputs.batch)
    checks.poison(plan)
    checks.compare(inputs, *checks.run_inputs(plan, inputs))
    assert plan.partial_o.isnan().all() and plan.partial_lse.isnan().all()


def test_scale() -> None:
    inputs = make(replace(MIXED, variant="CAUSAL+SOFT_CAP"))
    plan = checks.planner_for(inputs).plan(inputs.batch)
    checks.compare(inputs, *checks.run_inputs(plan, inputs, scale=0.3), scale=0.3)


def test_out_is_made_and_lse_is_optional() -> None:
    inputs = make(MIXED)
    plan = checks.planner_for(inputs).plan(inputs.batch)
    out, _ = checks.run_inputs(plan, inputs)
    made = run(plan, inputs.q, inputs.kv)
    assert torch.equal(made[: inputs.tokens], out[: inputs.tokens])


def test_output_with_strides() -> None:
    inputs = make(MIXED)
    plan = checks.planner_for(inputs).plan(inputs.batch)
    wide = torch.full((inputs.q.shape[0], 2 * 4, 64), 7.0, dtype=inputs.q.dtype)
    out = run(plan, inputs.q, inputs.kv, wide[:, ::2])
    assert torch.equal(out[: inputs.tokens], run(plan, inputs.q, inputs.kv)[: inputs.tokens])
    assert (wide[:, 1::2] == 7).all()


def test_rebind_reads_another_table() -> None:
    inputs, other = make(MIXED), make(replace(MIXED, table="token", page_size=3, seed=5))
    planner = checks.planner_for(inputs)
    plan = planner.plan(inputs.batch).rebind(other.batch)
    checks.compare(other, *checks.run_inputs(plan, other))


def test_cache_past_2_31_elements() -> None:
    """Only the touched pages of this memory are ever real."""
    page, token = 2**30, 2 * 64
    memory = torch.empty(3 * page + 2**21, dtype=torch.bfloat16)
    inputs = make(replace(MIXED, q_lens=(3, 1), kv_lens=(20, 30)))
    small = inputs.kv
    assert small.num_pages == 6
    k, v = (
        torch.as_strided(memory, (6, 16, 2, 64), (page // 2, token, 64, 1), start) for start in (0, 2**20)
    )
    k.copy_(small.k), v.copy_(small.v)
    inputs.kv = KVCache(k, v)
    assert k.stride(0) * 5 > 2**31
    plan = checks.planner_for(inputs).plan(inputs.batch)
    checks.compare(inputs, *checks.run_inputs(plan, inputs))


def test_oracle_agrees_with_torch() -> None:
    """The judge is judged once: one request, whole prompt, against torch's own attention."""
    inputs = make(Case((40,), (40,), dtype="f32"))
    n, pages = inputs.tokens, eager.pages_of(inputs.batch, 0)
    k, v = (eager.gather(x, pages, 40).double() for x in (inputs.kv.k, inputs.kv.v))
    heads = [x.transpose(0, 1)[None] for x in (inputs.q[:n].double(), k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    ours, _ = eager.attention(inputs.q, inputs.kv, inputs.batch, inputs.variant, {}, 64**-0.5)
    torch.testing.assert_close(ours, theirs[0].transpose(0, 1))


@pytest.mark.parametrize("workers", [1, 64])
def test_nan_in_a_query_stays_nan(workers: int) -> None:
    """Also through a merge, and in its own row only."""
    inputs = make(Case((1, 3), (900, 17)))
    plan = checks.planner_for(inputs, workers).plan(inputs.batch)
    clean, _ = checks.run_inputs(plan, inputs)
    assert (int(plan.header[1]) > 0) == (workers > 1), "merges"
    inputs.q[0, 1] = inputs.q[2, 0, 5] = float("nan")
    out, _ = checks.run_inputs(plan, inputs)
    assert out[0, 1].isnan().all() and out[2, 0].isnan().all()
    clean[0, 1] = clean[2, 0] = float("nan")
    assert torch.equal(out.nan_to_num(9), clean.nan_to_num(9))
