"""The GPU executor against the oracle: the CPU's cases in 16-bit types, and what only a GPU can get wrong."""

from __future__ import annotations

from dataclasses import replace

import checks
import pytest
import torch
from cases import Case, make
from grid import FUNCTIONS, LONG, MIXED, PIECES, SHAPES, TREES

from fi_backend import KVCache, append, run

pytestmark = pytest.mark.gpu
BOTH = pytest.mark.parametrize("dtype", ["bf16", "f16"])


@pytest.fixture(scope="session", autouse=True)
def kernels() -> None:
    """Builds every kernel of these tests first, one compiler per core: one by one it takes far longer."""
    if torch.cuda.is_available():
        checks.build(SHAPES + FUNCTIONS + FLAT, "cuda", ("bf16", "f16"))


FLAT = [
    replace(LONG, variant="CAUSAL+WINDOW+SINKS", window=700),
    Case((1,) * 6, (900, 1, 64, 65, 300, 0), q_heads=32, kv_heads=8, head_dim=128, extra_tokens=0),
]


@BOTH
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case: Case, dtype: str) -> None:
    checks.check_attention(replace(case, dtype=dtype), "cuda")


@BOTH
@pytest.mark.parametrize("case", FUNCTIONS, ids=lambda c: f"{c}-{c.window}")
def test_functions(case: Case, dtype: str) -> None:
    checks.check_attention(replace(case, dtype=dtype), "cuda")


@pytest.mark.parametrize("workers", [1, 2, 7, 64, 512])
def test_any_number_of_workers(workers: int) -> None:
    checks.check_attention(FLAT[0], "cuda", workers=workers)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("workers", [1, 7, 64, 512])
def test_pieces_of_a_tree(workers: int, batch_invariant: bool) -> None:
    checks.check_attention(PIECES, "cuda", workers=workers, batch_invariant=batch_invariant)


@pytest.mark.parametrize("case", [t for t in TREES if t.tree == "random" and "CAUSAL" in t.variant], ids=str)
def test_a_tree_without_branches_is_causal(case: Case) -> None:
    checks.check_chain(case, "cuda")


def test_planned_on_the_host() -> None:
    inputs = make(LONG, "cuda")
    host = {"qo_indptr_cpu": inputs.batch.qo_indptr.cpu(), "kv_len_cpu": inputs.batch.kv_len.cpu()}
    plan = checks.planner_for(inputs).plan(inputs.batch, on="host", **host)
    checks.poison(plan)
    checks.compare(inputs, *checks.run_inputs(plan, inputs))


@pytest.mark.parametrize("case", [MIXED, LONG, FLAT[0]], ids=str)
def test_bitwise_repeatable(case: Case) -> None:
    checks.check_repeats(case, "cuda")


def test_bitwise_repeatable_under_load() -> None:
    """50 times beside products on another stream, which take multiprocessors, caches and memory from it."""
    load = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(2000):  # half a second
            load @ load
    checks.check_repeats(replace(MIXED, head_dim=128), "cuda", times=50)
    torch.cuda.synchronize()


@pytest.mark.parametrize("variant", ["CAUSAL", "CAUSAL+WINDOW+SINKS"])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_lengths_below_the_planned_ones(variant: str, batch_invariant: bool) -> None:
    checks.check_upper_bound(replace(LONG, variant=variant), "cuda", batch_invariant=batch_invariant)


def test_differs_from_the_cpu_by_rounding_alone() -> None:
    case = replace(LONG, variant="CAUSAL+WINDOW+SOFT_CAP+ALIBI+SINKS", window=700)
    outs = []
    for device in ("cpu", "cuda"):
        inputs = make(case, device)
        outs.append(checks.run_inputs(checks.planner_for(inputs).plan(inputs.batch), inputs))
    n = inputs.tokens
    torch.testing.assert_close(outs[0][0][:n].float(), outs[1][0][:n].cpu().float(), rtol=2e-2, atol=4e-3)
    torch.testing.assert_close(outs[0][1][:n], outs[1][1][:n].cpu(), rtol=1e-5, atol=1e-4)


def test_cache_past_2_31_elements() -> None:
    page, token = 2**30, 2 * 64
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of GPU memory")
    memory = torch.empty(3 * page + 2**21, dtype=torch.bfloat16, device="cuda")
    inputs = make(replace(MIXED, q_lens=(3, 1), kv_lens=(20, 30)), "cuda")
    k, v = (torch.as_strided(memory, (6, 16, 2, 64), (page // 2, token, 64, 1), at) for at in (0, 2**20))
    assert k.stride(0) * 5 > 2**31
    k.copy_(inputs.kv.k)
    v.copy_(inputs.kv.v)
    inputs.kv = KVCache(k, v)
    plan = checks.planner_for(inputs).plan(inputs.batch)
    checks.compare(inputs, *checks.run_inputs(plan, inputs))
    last = torch.tensor([5 * 16 + 3], device="cuda")
    new = torch.full((1, 2, 64), 3.0, dtype=torch.bfloat16, device="cuda")
    append(inputs.kv, new, new, last)
    assert (k[5, 3] == 3).all() and (v[5, 3] == 3).all()


def _refill(inputs, other) -> None:
    """Another batch into the same addresses, as an engine does between replays."""
    for mine, theirs in ((inputs.q, other.q), (inputs.kv.k, other.kv.k), (inputs.kv.v, other.kv.v)):
        mine[: len(theirs)].copy_(theirs)
    inputs.batch.qo_indptr.copy_(other.batch.qo_indptr)
    inputs.batch.kv_len.copy_(other.batch.kv_len)
    inputs.batch.table[:, : other.batch.table.shape[1]].copy_(other.batch.table)


def test_graph_captured_on_decode_serves_any_split() -> None:
    """Captured with all query lengths 1, plan inside; replayed on mixed splits, padded requests and rows."""
    shape = {"q_heads": 32, "kv_heads": 8, "head_dim": 128, "extra_tokens": 0, "variant": "CAUSAL+WINDOW"}
    shape |= {"window": 300}
    longest = make(Case((1,) * 12, (1100,) * 12, **shape), "cuda")
    planner = checks.planner_for(longest)
    out, lse = torch.full_like(longest.out, float("nan")), torch.full_like(longest.lse, float("nan"))

    def step() -> None:
        plan = planner.plan(longest.batch)
        run(plan, longest.q, longest.kv, out, variant=longest.variant, lse=lse, **longest.variant_args)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    splits = [
        ((1,) * 12, (700, 3, 64, 65, 1, 1000, 20, 500, 63, 128, 129, 1100)),
        ((12,) + (0,) * 11, (1024,) + (0,) * 11),
        ((1, 1, 5, 1, 0, 0, 0, 0, 0, 0, 0, 0), (900, 40, 77, 1, 0, 0, 0, 0, 0, 0, 0, 0)),
        ((3, 4, 5) + (0,) * 9, (3, 4, 1000) + (0,) * 9),
        ((0,) * 12, (0,) * 12),
    ]
    for seed, (q_lens, kv_lens) in enumerate(splits):
        tokens = sum(q_lens)
        other = make(Case(q_lens, kv_lens, seed=seed, **(shape | {"extra_tokens": 12 - tokens})), "cuda")
        _refill(longest, other)
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        planner.partial_o.fill_(float("nan"))
        planner.partial_lse.fill_(float("nan"))
        graph.replay()
        checks.compare(other, out, lse)


def test_a_batch_beyond_the_capacity_gives_nan() -> None:
    """Nobody can be told without synchronising; rows of the last batch must not pass for an answer."""
    inputs = make(replace(LONG, q_lens=(1, 480, 1)), "cuda")  # 480 tokens are more row tiles than 3 can be
    planner = checks.planner_for(inputs, max_requests=3, max_tokens=3)
    out, lse = checks.run_inputs(planner.plan(inputs.batch), inputs)
    assert out.isnan().all() and lse.isnan().all()
    out.fill_(0)
    run(planner.plan(inputs.batch), inputs.q, inputs.kv, out, variant=inputs.variant)
    assert out.isnan().all()


def test_runs_on_the_current_stream() -> None:
    inputs = make(LONG, "cuda")
    planner = checks.planner_for(inputs)
    expected = checks.run_inputs(planner.plan(inputs.batch), inputs)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    q, late = inputs.q, torch.full_like(inputs.q, float("nan"))
    inputs.q = late
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(q)  # done long after the launch below was queued
        out, lse = checks.run_inputs(planner.plan(inputs.batch), inputs)
    side.synchronize()
    n = inputs.tokens
    assert torch.equal(out[:n], expected[0][:n]) and torch.equal(lse[:n], expected[1][:n])


@pytest.mark.parametrize("layout", ["NHD", "HND", "packed", "padded"])
@BOTH
def test_append(layout: str, dtype: str) -> None:
    checks.check_append(Case((1,), (150,), page_size=16, layout=layout, dtype=dtype), "cuda")
    checks.check_append(Case((1,), (150,), page_size=1, layout=layout, dtype=dtype), "cuda", tokens=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: {"q": i.q.cpu()}, "expected q on cuda:0, got cpu"),
        (lambda i: {"q": i.q.new_zeros(6, 4, 65)[..., 1:]}, "expected q aligned to 16 bytes"),
        (
            lambda i: {"q": i.q.new_zeros(6, 4, 68)[..., :64]},
            "strides that are multiples of 16 bytes, got stride 68",
        ),
        (
            lambda i: {"q": i.q.float(), "out": None, "lse": None},
            "expected dtype bf16 or f16 on sm.*, got f32",
        ),
    ],
)
def test_refusals_of_the_gpu(change, message: str) -> None:
    inputs = make(Case((1, 3), (40, 17)), "cuda")
    plan = checks.planner_for(inputs).plan(inputs.batch)
    with pytest.raises(ValueError, match=message):
        run(plan, **({"q": inputs.q, "kv": inputs.kv, "out": inputs.out} | change(inputs)))


def test_append_of_rows_that_are_no_whole_vectors() -> None:
    kv = KVCache.separate(*torch.zeros(2, 4, 16, 2, 24, device="cuda", dtype=torch.bfloat16)[..., :20])
    new = torch.zeros(1, 2, 24, device="cuda", dtype=torch.bfloat16)[..., :20]
    with pytest.raises(ValueError, match="rows of a multiple of 16 bytes, got 20 elements of 2 bytes"):
        append(kv, new, new, torch.zeros(1, device="cuda", dtype=torch.int64))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_tensors_that_are_not_on_the_current_gpu() -> None:
    checks.check_attention(LONG, "cuda:1")
    checks.check_append(Case((1,), (150,)), "cuda:1")


def test_run_does_not_synchronise() -> None:
    inputs = make(FLAT[1], "cuda")
    planner = checks.planner_for(inputs)
    checks.run_inputs(planner.plan(inputs.batch), inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        checks.run_inputs(planner.plan(inputs.batch), inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
