"""Composable formats on a GPU: the host's plans, the oracle, graphs that follow the tree."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import checks
import pytest
import torch
from cases import Case, Inputs, make
from grid import EVERYTHING, SHARED
from test_levels import case_of
from test_plan_gpu import no_synchronisation

from fi_backend import Composable, Plan, run

pytestmark = pytest.mark.gpu
DIMS = (128, 64, 32)  # the last is sm80's
VARIANTS = ("CAUSAL", EVERYTHING)
KERNELS = [replace(SHARED, head_dim=dim, variant=variant) for dim in DIMS for variant in VARIANTS]
OTHERS = [
    replace(SHARED, head_dim=256),
    replace(SHARED, head_dim=128, dtype="f16", page_size=3, table="token"),
]


@pytest.fixture(scope="session", autouse=True)
def kernels() -> None:
    if torch.cuda.is_available():
        checks.build(KERNELS + OTHERS[:1], "cuda", ("bf16",), levels=True)
        checks.build(KERNELS[:1], "cuda", ("bf16", "f16"), levels=True)


@pytest.mark.parametrize("case", KERNELS + OTHERS, ids=str)
@pytest.mark.parametrize("workers", [None, 3])
def test_shared_prefixes(case: Case, workers: int | None) -> None:
    checks.check_shared(
        replace(case, window=500), "cuda", **({} if workers is None else {"workers": workers})
    )


@pytest.mark.parametrize("seed", range(60))
def test_random_trees(seed: int) -> None:
    rng = random.Random(seed)
    heads = {"kv_heads": 2, "q_heads": 2 * rng.choice((1, 2, 4, 8))}
    shape = {"head_dim": rng.choice(DIMS), "dtype": "bf16", "variant": rng.choice(VARIANTS), **heads}
    inputs = make(case_of(rng, scale=2, window=300, **shape), "cuda")
    planner = checks.sharing_planner(inputs, levels=rng.randint(2, 8))
    with no_synchronisation():
        plan = planner.plan(Composable(inputs.batch))
    checks.poison(plan)
    checks.compare(inputs, *checks.run_inputs(plan, inputs))


@pytest.mark.parametrize("seed", range(10))
def test_same_bytes_as_the_host(seed: int) -> None:
    case = case_of(random.Random(seed), scale=2, head_dim=128, dtype="bf16", variant="CAUSAL")
    inputs = make(case, "cuda")
    device = checks.sharing_planner(inputs)
    tree = device.finder
    assert tree is not None
    device._buffer.fill_(0xAB)
    device.plan(Composable(inputs.batch))
    host = checks.sharing_planner(make(case), tiles=device.tiles)
    assert host.finder is not None
    host._buffer.fill_(0xAB)
    host.plan(Composable(make(case).batch))
    found, wanted = device._buffer.cpu(), host._buffer
    at = host.layout.levels_for_run  # addresses
    found[at : at + 64] = wanted[at : at + 64] = 0
    assert torch.equal(found, wanted)
    assert torch.equal(tree.header.cpu(), host.finder.header)


def test_hints() -> None:
    inputs = make(SHARED, "cuda")
    planner = checks.sharing_planner(inputs)
    lengths = {"qo_indptr_cpu": inputs.batch.qo_indptr.cpu(), "kv_len_cpu": inputs.batch.kv_len.cpu()}
    keys = 320 // planner.tiles.kv * planner.tiles.kv
    plan = planner.plan(Composable(inputs.batch, [(range(7), keys)]), **lengths)
    checks.poison(plan)
    checks.compare(inputs, *checks.run_inputs(plan, inputs))
    assert planner.finder is not None and planner.finder.header[0] == 1
    with pytest.raises(ValueError, match="expected qo_indptr_cpu and kv_len_cpu with prefixes on a GPU"):
        planner.plan(Composable(inputs.batch, [(range(7), keys)]))


def test_bitwise_repeatable() -> None:
    inputs = make(replace(SHARED, head_dim=128), "cuda")
    planner = checks.sharing_planner(inputs)
    first = checks.run_inputs(planner.plan(Composable(inputs.batch)), inputs)
    for _ in range(20):
        plan = planner.plan(Composable(inputs.batch))
        checks.poison(plan)
        again = checks.run_inputs(plan, inputs)
        n = inputs.tokens
        assert all(torch.equal(a[:n], b[:n]) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("head_dim", [128, 32])
def test_captured_on_one_tree_replayed_on_others(head_dim: int) -> None:
    """Prefixes found, planned and run inside the graph; replayed on deeper trees, on none, on empty rows."""
    shape = {"q_heads": 8, "kv_heads": 2, "head_dim": head_dim, "extra_tokens": 0}
    longest = make(Case((1,) * 12, (1500,) * 12, prefixes=((0, 12, 256),), **shape), "cuda")
    planner = checks.sharing_planner(longest, levels=4)
    out, lse = torch.full_like(longest.out, float("nan")), torch.full_like(longest.lse, float("nan"))

    def step() -> None:
        plan = planner.plan(Composable(longest.batch))
        run(plan, longest.q, longest.kv, out, variant=longest.variant, lse=lse)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    trees = [
        ((0, 12, 1024),),
        ((0, 6, 512), (6, 6, 700), (0, 3, 1152), (6, 2, 1400)),
        (),
        ((0, 12, 256), (2, 8, 640), (4, 3, 1300)),
    ]
    shared = []
    for seed, prefixes in enumerate(trees):
        rng = random.Random(seed)
        most = max([keys for *_, keys in prefixes], default=100)
        kv_lens = tuple(most + rng.randint(1, 1499 - most) for _ in range(12))
        other = make(Case((1,) * 12, kv_lens, prefixes=prefixes, seed=seed, **shape), "cuda")
        checks.refill(longest, other)
        out.fill_(float("nan"))
        planner.partial_o.fill_(float("nan"))
        planner.partial_lse.fill_(float("nan"))
        graph.replay()
        checks.compare(other, out, lse)
        assert planner.finder is not None
        shared.append(int(planner.finder.header[0]))
    assert shared[2] == 0 and shared[0] == 1 and shared[1] > 1 and shared[3] > 1
    longest.batch.kv_len.zero_()  # an engine's padded requests
    graph.replay()
    assert (out == 0).all() and (lse == -torch.inf).all()


def graph_of(plan: Plan, room: Inputs, out: torch.Tensor, lse: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        run(plan, room.q, room.kv, out, variant=room.variant, lse=lse)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@pytest.mark.parametrize("head_dim", [128, 32])
@pytest.mark.parametrize("requests", [1, 2, 12])
def test_run_captured_at_one_number_of_requests_replayed_at_others(requests: int, head_dim: int) -> None:
    """Planned outside the graph."""
    room = make(replace(checks.ROOM, head_dim=head_dim), "cuda")
    checks.check_follows(room, checks.sharing_planner(room, levels=4), requests, graph_of)


def test_beyond_the_capacities() -> None:
    """Nothing is planned, all rows are NaN, `check` says why."""
    inputs = make(replace(SHARED, head_dim=128), "cuda")
    planner = checks.sharing_planner(inputs)
    inputs.batch.qo_indptr[1:] += 100_000
    plan = planner.plan(Composable(inputs.batch))
    out, _ = checks.run_inputs(plan, inputs)
    assert out.isnan().all()
    with pytest.raises(RuntimeError, match="expected lengths within max_tokens"):
        plan.check()
