"""Plans that skip: KV tiles that a mask hides are in no item and are not loaded; all others are, once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import checks
import numpy as np
import pytest
import torch
from cases import Case, Inputs, make
from defined import DOCUMENTS, PAGES, PREFIX, SHARES, STEPS
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import Arrays, Setup, arrays, batch_of, check_numbering, item_costs, setups, worker_loads

from fi_backend import Plan, Planner, eager, measure
from fi_backend.plan import cost_model
from fi_backend.variants import ALIBI, CAUSAL, FULL, TREE, WINDOW, Argument, Variant, define

CASE = Case((1, 70, 0, 300, 8, 5), (900, 700, 5, 300, 700, 0), dtype="f32", variant="FULL")
REQUESTS = len(CASE.q_lens)


def per_request(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


SKIPS: dict[str, tuple[Variant, dict[str, Any]]] = {
    "documents": (DOCUMENTS, {"document": per_request(100, 64, 1, 90, 130, 7)}),
    "prefix": (PREFIX, {"prefix": per_request(40, 2, 5, 200, 90, 9)}),
    "strided": (STEPS, {"stride": 20}),
    "keys": (PAGES, {"length": 100, "back": per_request(0, 300, 0, 30, 70, 5, dtype=torch.int64)}),
    "window": (CAUSAL + WINDOW, {"window": 90}),
    "both": (
        CAUSAL + STEPS + PAGES,
        {"stride": 9, "length": 300, "back": torch.zeros(6, dtype=torch.int64)},
    ),
    "tree": (
        CAUSAL + TREE + STEPS,
        {"tree_mask": torch.arange(8 * REQUESTS) % 3 + 1, "tree_tokens": 8, "stride": 11},
    ),
    "everything": (FULL, {}),
}


def visible(variant: Variant, args: dict[str, Any], request: int, q_len: int, kv_len: int) -> np.ndarray:
    """[tokens, keys] bool."""
    q_pos, kv_pos = torch.arange(q_len) + kv_len - q_len, torch.arange(kv_len)
    seen = torch.ones(q_len, kv_len, dtype=torch.bool)
    for feature in variant.features:
        if feature.mask is not None:
            seen &= feature.mask(
                q_pos, kv_pos, request=request, q_len=q_len, kv_len=kv_len, q_first=0, **args
            )
    return seen.numpy()


def skipping(s: Setup, variant: Variant, **changes: Any) -> Planner:
    wanted = {"causal": None, "window": None, "skip": variant, "max_kv_len": max((*s.kv_lens, 1))}
    return s.planner(**(wanted | changes))


def check_skipped(s: Setup, variant: Variant, args: dict[str, Any], planner: Planner, plan: Arrays) -> None:
    """Every visible pair is in one item, every tile of an item has a visible pair, every row is written."""
    lengths = list(zip(s.q_lens, s.kv_lens, strict=True))
    seen = [np.repeat(visible(variant, args, r, *n), s.group, 0) for r, n in enumerate(lengths)]
    reads = [[np.zeros_like(x, dtype=np.int32) for _ in range(s.kv_heads)] for x in seen]
    first = [np.zeros(len(x), dtype=np.int32) for x in seen]
    before = np.cumsum([0, *s.q_lens]) * s.group
    for request, row, head, begin, end, _, flags, _ in plan.items.tolist():
        rows = slice(row, row + s.width[bool(flags & 1)])
        line = request + before[request] // s.q_wide + row // s.q_wide
        entries = planner.tile_list[line, begin // s.tile_kv : end // s.tile_kv]
        tiles = (entries // 2).tolist()
        assert tiles == sorted(set(tiles)) and end // s.tile_kv <= planner.list_counts[line]
        for tile, whole in zip(tiles, (entries % 2).tolist(), strict=True):
            keys = slice(tile * s.tile_kv, (tile + 1) * s.tile_kv)
            inside = keys.stop <= s.kv_lens[request]
            assert whole == (inside and seen[request][rows, keys].all()), "where the mask need not be asked"
            assert seen[request][rows, keys].any(), "a tile that nobody sees"
            reads[request][head][rows, keys] += 1
        if head == 0 and flags & 2:
            first[request][rows] += 1
    for request, mask in enumerate(seen):
        assert all((count[mask] == 1).all() for count in reads[request])
        assert (first[request] == 1).all()


MASK_OF = st.sampled_from(("documents", "prefix", "strided", "keys", "window", "both"))


def arguments(name: str, requests: int, draw: st.DataObject) -> tuple[Variant, dict[str, Any]]:
    """Such a variant with arguments for tiles of few keys."""
    variant, _ = SKIPS[name]
    args: dict[str, Any] = {}
    for arg in variant.args:
        some = st.integers(1, 60)
        if arg.kind == "tensor":
            args[arg.name] = torch.tensor([draw.draw(some) for _ in range(requests)], dtype=arg.dtype)
        else:
            args[arg.name] = draw.draw(some)
    return variant, args


@given(setups(), MASK_OF, st.data())
@settings(max_examples=120, deadline=None)
def test_every_visible_pair_once_and_no_hidden_tile(s: Setup, name: str, data: st.DataObject) -> None:
    variant, args = arguments(name, len(s.q_lens), data)
    planner = skipping(s, variant)
    planner._buffer.fill_(0xAB)
    plan = arrays(planner.plan(s.batch(), **args))
    check_skipped(s, variant, args, planner, plan)
    check_numbering(s, plan)
    cost = cost_model(s.room)
    share = max(plan.total / s.workers, cost.min_slice)
    slack = share / cost.spread_slack if (plan.items[:, 6] & 1).any() else 0
    assert worker_loads(s, plan, cost).max() <= share + slack + cost.uncut
    assert item_costs(s, plan, cost).sum() >= plan.total


@given(setups())
@settings(max_examples=40, deadline=None)
def test_built_in_ranges_are_the_planners_own(s: Setup) -> None:
    """CAUSAL and WINDOW by a list: the same row tiles, cut in the same places."""
    s = replace(s, causal=True)
    variant = CAUSAL + WINDOW if s.window else CAUSAL
    args = {"window": s.window} if s.window else {}
    own, listed = arrays(s.planner().plan(s.batch())), arrays(skipping(s, variant).plan(s.batch(), **args))
    assert own.total >= listed.total  # a row tile of a window may have nothing below its last row's keys
    columns = [0, 1, 2, 6]
    assert own.total != listed.total or np.array_equal(own.items[:, columns], listed.items[:, columns])


def inputs_of(name: str, device: str = "cpu", **changes: Any) -> Inputs:
    variant, args = SKIPS[name]
    inputs = make(replace(CASE, **changes), device)
    inputs.variant = variant
    inputs.variant_args = {k: v.to(device) if torch.is_tensor(v) else v for k, v in args.items()}
    return inputs


def plan_of(inputs: Inputs, workers: int | None = None, **changes: Any) -> Plan:
    wanted = {"causal": None, "window": None, "skip": inputs.variant}
    planner = checks.planner_for(inputs, workers, **(wanted | changes))
    plan = planner.plan(inputs.batch, **(inputs.variant_args if planner.skip is not None else {}))
    checks.poison(plan)
    return plan


def poison_hidden(inputs: Inputs, tile_kv: int) -> int:
    """NaN into the pages of KV tiles that nobody of a request sees. Returns how many."""
    poisoned = 0
    for request, lengths in enumerate(zip(CASE.q_lens, CASE.kv_lens, strict=True)):
        args = {k: v.cpu() if torch.is_tensor(v) else v for k, v in inputs.variant_args.items()}
        seen = visible(inputs.variant, args, request, *lengths).any(0)
        for page, number in enumerate(eager.pages_of(inputs.batch, request)):
            tile = page * inputs.batch.page_size // tile_kv * tile_kv
            if lengths[0] and not seen[tile : tile + tile_kv].any():
                inputs.kv.k[number] = inputs.kv.v[number] = torch.nan
                poisoned += 1
    return poisoned


def check_run(inputs: Inputs, plan: Plan) -> None:
    """Against the oracle, which multiplies hidden keys by 0: they are NaN for ours alone."""
    keys, values = inputs.kv.k.clone(), inputs.kv.v.clone()
    poison_hidden(inputs, plan.planner.tiles.kv)
    out, lse = checks.run_inputs(plan, inputs)
    inputs.kv.k.copy_(keys), inputs.kv.v.copy_(values)
    checks.compare(inputs, out, lse)


@pytest.mark.parametrize("name", SKIPS)
def test_on_the_cpu(name: str) -> None:
    inputs = inputs_of(name)
    for workers in (None, 3, 60):
        check_run(inputs, plan_of(inputs, workers))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", SKIPS)
def test_on_the_gpu(name: str, head_dim: int) -> None:
    for page in ({}, {"page_size": 1, "table": "token"}, {"page_size": 1, "run": 300}):
        inputs = inputs_of(name, "cuda", dtype="bf16", head_dim=head_dim, **page)
        for workers in (None, 7):
            check_run(inputs, plan_of(inputs, workers))


def lists_on(device: str, s: Setup, variant: Variant) -> Planner:
    capacity = {"max_requests": 40, "max_tokens": 900, "max_kv_len": 3000, "device": device}
    return skipping(s, variant, **capacity)


def lengths_and_arguments(rng: np.random.Generator, requests: int) -> tuple[Setup, dict[str, Any]]:
    q_lens = rng.multinomial(int(rng.integers(0, 900)), rng.dirichlet(np.full(requests, 0.3)))
    kv_lens = q_lens + rng.integers(0, 2000, requests)
    s = Setup(tuple(map(int, q_lens)), tuple(map(int, kv_lens)), 2, 3, 60, 128, 64, 128, room=90)
    back = torch.from_numpy(rng.integers(0, 500, requests))
    return s, {"stride": int(rng.integers(1, 40)), "length": 300, "back": back}


@pytest.mark.gpu
def test_a_gpus_lists_and_plans_have_the_hosts_bytes() -> None:
    rng, variant = np.random.default_rng(0), SKIPS["both"][0]
    for _ in range(20):
        s, args = lengths_and_arguments(rng, int(rng.integers(1, 40)))
        host, device = lists_on("cpu", s, variant), lists_on("cuda", s, variant)
        host._buffer.fill_(0xAB), device._buffer.fill_(0xAB)
        host.plan(s.batch(), **args)
        batch, args["back"] = s.batch("cuda"), args["back"].cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            device.plan(batch, **args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(host._buffer, device._buffer.cpu())


@pytest.mark.gpu
def test_a_captured_plan_follows_lengths_and_masks() -> None:
    rng, variant = np.random.default_rng(1), SKIPS["both"][0]
    s, args = lengths_and_arguments(rng, 40)
    host, device = lists_on("cpu", s, variant), lists_on("cuda", s, variant)
    batch, back = s.batch("cuda"), args["back"].cuda()
    device.plan(batch, **(args | {"back": back}))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        device.plan(batch, **(args | {"back": back}))
    for _ in range(10):
        s, new = lengths_and_arguments(rng, 40)
        changed = s.batch()
        batch.qo_indptr.copy_(changed.qo_indptr), batch.kv_len.copy_(changed.kv_len), back.copy_(new["back"])
        host._buffer.zero_(), device._buffer.zero_()
        host.plan(changed, **(args | {"back": new["back"]}))
        graph.replay()
        assert torch.equal(host._buffer, device._buffer.cpu())


@pytest.mark.gpu
def test_lengths_beyond_the_list_are_found_by_check() -> None:
    s, args = lengths_and_arguments(np.random.default_rng(2), 3)
    planner = lists_on("cuda", s, SKIPS["both"][0])
    batch = batch_of((1, 2, 3), (100, 4000, 50), "cuda")
    plan = planner.plan(batch, **(args | {"back": args["back"].cuda()}))
    with pytest.raises(RuntimeError, match="max_kv_len 3000"):
        plan.check()


def test_hidden_tiles_are_loaded_without_skip() -> None:
    """The control of the poison."""
    inputs = inputs_of("documents")
    plan = plan_of(inputs, skip=None, causal=False)
    assert poison_hidden(inputs, plan.planner.tiles.kv) > 20
    out, _ = checks.run_inputs(plan, inputs)
    assert out[: inputs.tokens].isnan().any()


def test_a_wrong_list_is_noticed() -> None:
    inputs = inputs_of("documents")
    plan = plan_of(inputs)
    used = plan.planner.tile_list[:, 1:3]
    used.copy_(used.flip(1) - 2)
    with pytest.raises(AssertionError):
        checks.compare(inputs, *checks.run_inputs(plan, inputs))


def test_a_mask_that_is_not_asked_is_noticed() -> None:
    inputs = inputs_of("documents")
    plan = plan_of(inputs)
    plan.planner.tile_list |= 1  # every row sees all keys of each tile
    with pytest.raises(AssertionError):
        checks.compare(inputs, *checks.run_inputs(plan, inputs))


def test_more_features_than_the_plan_skips_by() -> None:
    inputs = inputs_of("documents")
    plan = plan_of(inputs)
    inputs.variant = DOCUMENTS + ALIBI
    inputs.variant_args["alibi_slopes"] = torch.tensor([0.5, 0.25, 0.1, 0.0])
    check_run(inputs, plan)


def test_fewer_items_than_without() -> None:
    inputs = inputs_of("documents")
    totals = [int(arrays(plan_of(inputs, **c)).total) for c in ({}, {"skip": None, "causal": False})]
    assert totals[0] < totals[1] / 2


def test_what_is_refused_of_a_planner() -> None:
    inputs = inputs_of("documents")
    by_head = define(
        "BY_HEAD",
        text="""
        struct Odd { Row r; FI_HD bool sees(int32_t kv_pos) const { return (kv_pos + r.q_head) % 2 == 1; } };
        template <class A>
        FI_HD static Odd mask(const A&, const Row& r) { return {r}; }
        template <class A>
        FI_HD static int32_t seen_before(const A&, const Row&) { return 0; }
        """,
        mask=lambda q_pos, kv_pos, **_: None,
    )
    for changes, words in (
        ({"causal": True}, "expected skip without causal and window, .* causal=True and window=None"),
        ({"window": 5}, "expected skip without causal and window, .* window=5"),
        (
            {"skip": DOCUMENTS + ALIBI},
            r"skip of masks and ranges of keys alone, got ALIBI in DOCUMENTS\+ALIBI",
        ),
        ({"skip": SHARES}, "skip of masks and ranges of keys alone, got SHARES"),
        ({"skip": by_head}, "expected skip that is the same for all heads, got BY_HEAD: q_head"),
        ({"max_kv_len": None}, "skip needs max_kv_len, got none"),
        ({"batch_invariant": True}, "expected batch_invariant or skip, got both"),
        (
            {"max_requests": 1 << 24, "max_kv_len": 1 << 30},
            r"expected skip to list fewer than 2\^31 KV tiles",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            plan_of(inputs, **changes)
    with pytest.raises(TypeError, match="expected skip to be a Variant, got str"):
        plan_of(inputs, skip="DOCUMENTS")


def test_what_is_refused_of_a_plan() -> None:
    inputs = inputs_of("strided")
    planner, batch = plan_of(inputs).planner, inputs.batch
    with pytest.raises(ValueError, match="variant STEPS needs argument stride"):
        planner.plan(batch)
    with pytest.raises(ValueError, match='expected on="device" with skip'):
        planner.plan(batch, on="host", stride=20)
    with pytest.raises(ValueError, match="expected no stride without skip"):
        checks.planner_for(inputs).plan(batch, stride=20)
    batch.kv_len[1] += 1000
    with pytest.raises(ValueError, match="kv_len from 0 to 900, got 1700 at request 1"):
        planner.plan(batch, stride=20)
    inputs = inputs_of("documents")
    with pytest.raises(ValueError, match=r"expected document of at least 6 requests \(the batch's\), got 2"):
        plan_of(inputs).planner.plan(inputs.batch, document=per_request(1, 2))


def test_what_is_refused_of_a_run() -> None:
    inputs = inputs_of("strided")
    plan = plan_of(inputs)
    with pytest.raises(ValueError, match=r"expected a variant with all of STEPS .*, got CAUSAL"):
        checks.run_inputs(plan, replace(inputs, variant=CAUSAL, variant_args={}))
    with pytest.raises(ValueError, match=r"expected stride of 20 \(the plan's skip\), got 21"):
        checks.run_inputs(plan, inputs, stride=21)
    inputs.batch.kv_len[0] -= 1  # an upper bound is not enough: the row's position counts
    with pytest.raises(ValueError, match=r"expected kv_len as planned with skip, .*900, .*got .*899"):
        checks.run_inputs(plan, inputs)


def test_shown_and_measured() -> None:
    inputs = inputs_of("documents")
    plan = plan_of(inputs)
    times = measure(plan, inputs.q, inputs.kv, variant=inputs.variant, **inputs.variant_args)
    assert "of those it sees" in plan.show(times=times)


def test_numbers_of_other_kinds_are_masks_too() -> None:
    near = define("NEAR", Argument("ratio", "float"), mask="abs(q_pos - kv_pos) < ratio * kv_len")
    inputs = replace(inputs_of("strided"), variant=near, variant_args={"ratio": 0.1})
    check_run(inputs, plan_of(inputs))
