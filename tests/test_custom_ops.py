"""`run` and `append` under torch.compile: traced whole, right for every plan, the cache written in place."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import checks
import pytest
import torch
from cases import Case, Inputs, make
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fi_backend import KVCache, Plan, append, custom_ops, run

CASE = Case((1, 3), (40, 17), extra_tokens=0, variant="CAUSAL+WINDOW+SOFT_CAP+SINKS", dtype="f32")
GPU = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
on_each_device = pytest.mark.parametrize("device", GPU)
CAPACITY = {"max_requests": 8, "max_tokens": 64, "max_kv_len": 400}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def _inputs(device: str, **changes: Any) -> Inputs:
    return make(replace(CASE, dtype="f32" if device == "cpu" else "bf16", **changes), device)


def _new(inputs: Inputs, tokens: int = 3) -> list[torch.Tensor]:
    """k, v, slot_mapping: a token nowhere, one past the last key of its page, one on a page of nobody."""
    shape = (2, tokens, inputs.kv.kv_heads, inputs.kv.head_dim_qk)
    k, v = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(inputs.q)
    return [k, v, torch.tensor([-1, 3 * 16 + 15, 2], device=k.device)]


def _layer(inputs: Inputs) -> Callable[..., torch.Tensor]:
    def layer(plan, q, kv, k, v, slots, lse):  # type: ignore[no-untyped-def]
        append(kv, k * 2, v, slots)
        out = run(plan, q * 2, kv, variant=inputs.variant, lse=lse, **inputs.variant_args)
        return out.flatten(1) + 1

    return layer


@on_each_device
@pytest.mark.parametrize("lse", [False, True])
def test_opcheck(device: str, lse: bool) -> None:
    inputs = _inputs(device)
    plan = checks.planner_for(inputs).plan(inputs.batch)
    run_args = (
        *(plan.handle, inputs.kv.handle, inputs.q, inputs.out),
        *(inputs.lse if lse else None, None if lse else 0.25, inputs.variant.name),
        *(["sinks", "window", "soft_cap"], [inputs.variant_args["sinks"]], [50, 3.0]),
    )
    opcheck(torch.ops.fi_backend.run.default, run_args)
    opcheck(torch.ops.fi_backend.append.default, (inputs.kv.handle, *_new(inputs)))


def _check_layer(device: str, layout: str, backend: Any, **compiler: Any) -> None:
    ours, theirs = _inputs(device, layout=layout), _inputs(device, layout=layout)
    plan = checks.planner_for(ours).plan(ours.batch)
    layer = _layer(ours)
    compiled = torch.compile(layer, fullgraph=True, backend=backend, **compiler)
    wanted = layer(plan, ours.q, ours.kv, *_new(ours), ours.lse)
    found = compiled(plan, theirs.q, theirs.kv, *_new(ours), theirs.lse)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    for a, b in ((ours.lse, theirs.lse), (ours.kv.k, theirs.kv.k), (ours.kv.v, theirs.kv.v)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", ["NHD", "HND", "packed", "padded"])
def test_a_layer(layout: str) -> None:
    _check_layer("cpu", layout, "aot_eager")


@pytest.mark.parametrize("layout", ["packed", "stacked"])
def test_the_cache_is_not_copied(layout: str) -> None:
    """K and V are views of one tensor. Nothing here makes inductor compile C++."""
    inputs = _inputs("cpu", layout="packed")
    if layout == "stacked":
        inputs.kv = KVCache(*torch.stack([inputs.kv.k, inputs.kv.v]))
    plan = checks.planner_for(inputs).plan(inputs.batch)
    settings = {"variant": inputs.variant, **inputs.variant_args}

    def layer(plan, q, kv, k, v, slots):  # type: ignore[no-untyped-def]
        append(kv, k, v, slots)
        return run(plan, q, kv, **settings)

    compiled = torch.compile(layer, fullgraph=True)
    found, (code,) = run_and_get_code(compiled, plan, inputs.q, inputs.kv, *_new(inputs))
    assert torch.equal(found, run(plan, inputs.q, inputs.kv, **settings))
    allocated = [line for line in code.splitlines() if "= empty_strided_cpu(" in line]
    assert len(allocated) == 1 and "(4, 4, 64)" in allocated[0], f"expected out alone, got {allocated}"


def test_plans_of_one_planner_are_one_graph() -> None:
    """Other lengths, other requests, another table: nothing is compiled again, and nothing is left over."""
    first = _inputs("cpu")
    planner = checks.planner_for(first, **CAPACITY)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_layer(first), fullgraph=True, backend=counter)
    memory = torch.zeros(2, 64, 16, 2, 64)  # one cache for all, as an engine has
    lengths = [((1, 3), (40, 17)), ((2, 2), (70, 333)), ((1, 1, 1, 1), (9, 200, 1, 64)), ((4,), (130,))]
    for seed, (q_lens, kv_lens) in enumerate(lengths):
        inputs = _inputs("cpu", q_lens=q_lens, kv_lens=kv_lens, seed=seed)
        pages = inputs.kv.num_pages
        memory[0, :pages], memory[1, :pages] = inputs.kv.k, inputs.kv.v
        plan, kv = planner.plan(inputs.batch), KVCache(*memory)
        args = (inputs.q, kv, *_new(inputs))
        wanted_lse = inputs.lse.clone()
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            found = compiled(plan, *args, inputs.lse)
        assert torch.equal(found, _layer(first)(plan, *args, wanted_lse))
        assert torch.equal(inputs.lse, wanted_lse) and not wanted_lse.isnan().any()
    assert counter.frame_count == 1


def test_a_plan_that_is_baked_in_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    handle_for, plans = custom_ops.handle_for, []

    def of_the_first(plan: Any) -> torch.Tensor:
        if not isinstance(plan, Plan):
            return handle_for(plan)
        plans.append(plan)
        return handle_for(plan) if plans[0] is plan else plans[0].handle

    monkeypatch.setattr(custom_ops, "handle_for", of_the_first)
    with pytest.raises(ValueError, match="expected the last plan of its planner"):
        test_plans_of_one_planner_are_one_graph()


def test_numbers_of_tokens_are_one_graph() -> None:
    inputs = _inputs("cpu", head_dim_vo=32, variant="CAUSAL")
    planner = checks.planner_for(inputs, **CAPACITY)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda plan, q, kv: run(plan, q, kv).flatten(1), fullgraph=True, backend=counter, dynamic=True
    )
    # never as many tokens as heads: sizes that are equal at first would be one symbol
    for q_lens, kv_lens in [((2, 3), (40, 17)), ((5, 4), (70, 333)), ((2, 1, 30), (9, 200, 100))]:
        inputs = _inputs("cpu", q_lens=q_lens, kv_lens=kv_lens, head_dim_vo=32, variant="CAUSAL")
        plan = planner.plan(inputs.batch)
        found = compiled(plan, inputs.q, inputs.kv)
        assert found.shape == (sum(q_lens), 4 * 32)
        assert torch.equal(found, run(plan, inputs.q, inputs.kv).flatten(1))
    assert counter.frame_count == 1


def test_two_plans_in_one_graph() -> None:
    inputs = _inputs("cpu", variant="CAUSAL")
    plan = checks.planner_for(inputs).plan(inputs.batch)
    other = plan.rebind(replace(inputs.batch, table=inputs.batch.table.flip(0)[1:].contiguous()))
    kv = KVCache(inputs.kv.k.nan_to_num(0.5), inputs.kv.v.nan_to_num(0.5))

    def both(one, two, q):  # type: ignore[no-untyped-def]
        return torch.stack([run(one, q, kv), run(two, q, kv)])

    found = torch.compile(both, fullgraph=True, backend="aot_eager")(plan, other, inputs.q)
    assert torch.equal(found, both(plan, other, inputs.q))
    assert not torch.equal(found[0], found[1])


def test_what_eager_refuses_is_refused() -> None:
    inputs, other = _inputs("cpu"), _inputs("cpu", q_lens=(2, 2))
    planner = checks.planner_for(inputs)
    plan = planner.plan(inputs.batch)
    compiled = torch.compile(
        lambda plan, q, kv, **settings: run(plan, q, kv, **settings), fullgraph=True, backend="aot_eager"
    )
    settings = {"variant": inputs.variant, **inputs.variant_args}
    compiled(plan, inputs.q, inputs.kv, **settings)
    planner.plan(other.batch)
    with pytest.raises(ValueError, match="expected the last plan of its planner, got one whose work items"):
        compiled(plan, inputs.q, inputs.kv, **settings)
    plan = planner.plan(inputs.batch)
    with pytest.raises(ValueError, match="takes window, soft_cap, sinks, got unknown argument alibi_slopes"):
        compiled(plan, inputs.q, inputs.kv, **settings, alibi_slopes=inputs.lse)
    with pytest.raises(ValueError, match="expected soft_cap <= 1000, got 1001"):
        compiled(plan, inputs.q, inputs.kv, **(settings | {"soft_cap": 1001.0}))


def test_handles() -> None:
    """Never of two plans at once, and of no plan once it is gone."""
    inputs = _inputs("cpu", variant="CAUSAL")
    planner = checks.planner_for(inputs)
    plans = [planner.plan(inputs.batch) for _ in range(3)]
    handles = [plan.handle for plan in plans]
    assert len({int(handle) for handle in handles}) == 3
    args = (inputs.kv.handle, inputs.q, inputs.out, None, None, "CAUSAL", [], [], [])
    del plans[2]
    gc.collect()
    with pytest.raises(RuntimeError, match="expected a plan that is alive"):
        torch.ops.fi_backend.run(handles[2], *args)
    assert inputs.out.isnan().all()
    assert len({id(planner.plan(inputs.batch).handle) for _ in range(9)}) == 1, "a new tensor for each plan"
    torch.ops.fi_backend.run(handles[0], *args)
    assert torch.equal(inputs.out, run(plans[0], inputs.q, inputs.kv))


def test_eager_calls_go_past_the_dispatcher() -> None:
    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.names.append(str(op))
            return op(*args, **(kwargs or {}))

    inputs = _inputs("cpu", variant="CAUSAL")
    plan = checks.planner_for(inputs).plan(inputs.batch)
    new = _new(inputs)
    with Seen() as seen:
        run(plan, inputs.q, inputs.kv, inputs.out)
        append(inputs.kv, *new)
    assert not [name for name in seen.names if name.startswith("fi_backend")]
    with Seen() as seen:  # the check can fail
        torch.ops.fi_backend.append(inputs.kv.handle, *new)
    assert "fi_backend.append.default" in seen.names


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["NHD", "packed"])
def test_inductor_on_a_gpu(layout: str) -> None:
    _check_layer("cuda", layout, "inductor")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_every_plan_on_a_gpu(mode: str) -> None:
    """reduce-overhead records CUDA graphs of its own, which must leave run out: a launch knows one plan."""
    first = _inputs("cuda")
    planner = checks.planner_for(first, **CAPACITY)
    layer = _layer(first)
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    memory = torch.zeros(2, 64, 16, 2, 64, device="cuda", dtype=torch.bfloat16)
    lengths = [((1, 3), (40, 17)), ((2, 2), (70, 333)), ((1, 1, 1, 1), (9, 200, 1, 64)), ((4,), (130,))]
    for seed, (q_lens, kv_lens) in enumerate(lengths * 2):
        inputs = _inputs("cuda", q_lens=q_lens, kv_lens=kv_lens, seed=seed)
        pages = inputs.kv.num_pages
        memory[0, :pages], memory[1, :pages] = inputs.kv.k, inputs.kv.v
        plan, kv = planner.plan(inputs.batch), KVCache(*memory)
        args = (inputs.q, kv, *_new(inputs))
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            found = compiled(plan, *args, inputs.lse).clone()
        assert torch.equal(found, layer(plan, *args, torch.empty_like(inputs.lse)))


@pytest.mark.gpu
def test_a_cuda_graph_of_the_compiled_layer() -> None:
    """Captured with the plan inside, replayed with other lengths in the same tensors."""
    inputs = _inputs("cuda")
    new, layer = _new(inputs), _layer(inputs)
    planner = checks.planner_for(inputs, **CAPACITY)
    compiled = torch.compile(layer, fullgraph=True)

    def step() -> torch.Tensor:
        return compiled(planner.plan(inputs.batch), inputs.q, inputs.kv, *new, inputs.lse)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for lengths in ((40, 17), (33, 3), (1, 16)):
        inputs.batch.kv_len.copy_(torch.tensor(lengths))
        graph.replay()
        wanted = layer(planner.plan(inputs.batch), inputs.q, inputs.kv, *new, torch.empty_like(inputs.lse))
        assert torch.equal(found, wanted) and not wanted.isnan().any()
