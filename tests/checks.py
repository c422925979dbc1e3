"""What every executor must do, whatever the device: the CPU and the GPU tests call these."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from cases import Case, Inputs, make

from fi_backend import Composable, Plan, Planner, Tiles, append, eager, jit, run
from fi_backend.compare import ATOL, lse_limit
from fi_backend.variants import CAUSAL, parse


def planner_for(inputs: Inputs, workers: int | None = None, **changes: Any) -> Planner:
    case, kv = inputs.case, inputs.kv
    invariant = changes.get("batch_invariant", False)
    tiles = Tiles.for_device(kv.device, kv.head_dim_qk, kv.head_dim_vo, invariant)
    if workers is not None:
        tiles = replace(tiles, workers=workers)
    wanted: dict[str, Any] = {
        "q_heads": case.q_heads,
        "kv_heads": case.kv_heads,
        "head_dim": kv.head_dim_qk,
        "head_dim_vo": kv.head_dim_vo,
        "max_requests": max(len(case.q_lens), 1),
        "max_tokens": max(inputs.tokens, 1),
        "max_kv_len": max(1, 1, *case.kv_lens),
        "causal": CAUSAL in inputs.variant,
        "window": inputs.variant_args.get("window"),
        "device": kv.device,
        "tiles": tiles,
    }
    return Planner(**(wanted | changes))


def poison(plan: Plan) -> None:
    for x in (plan.partial_o, plan.partial_lse, plan.planner.partial_sum):
        if x is not None:
            x.fill_(float("nan"))


def run_inputs(plan: Plan, inputs: Inputs, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.full_like(inputs.out, float("nan")), torch.full_like(inputs.lse, float("nan"))
    wanted = lse if inputs.variant.softmax else None
    settings: dict[str, Any] = {"variant": inputs.variant, "lse": wanted, **inputs.variant_args}
    run(plan, inputs.q, inputs.kv, out, **(settings | changes))
    return out, lse


def compare(inputs: Inputs, out: torch.Tensor, lse: torch.Tensor, scale: float | None = None) -> None:
    """out and lse against the oracle, by the error that torch makes in the same precision."""
    case, n = inputs.case, inputs.tokens
    scale = scale or case.head_dim**-0.5
    ask = (inputs.q, inputs.kv, inputs.batch, inputs.variant, inputs.variant_args, scale)
    true_out, true_lse = eager.attention(*ask)
    eager_out, eager_lse = eager.attention(*ask, dtype=inputs.q.dtype)
    assert out[n:].isnan().all() and lse[n:].isnan().all(), "rows past the last request were written"
    ours, fair = (x[:n].double() - true_out for x in (out, eager_out.to(out.dtype)))
    assert not ours.isnan().any(), "a NaN reached the output"
    if n:
        limit = 2 * fair.abs().max() + ATOL[inputs.q.dtype]
        assert ours.abs().max() <= limit, f"error {ours.abs().max():.3e}, at most {limit:.3e} allowed"
        mean_limit = 2 * fair.abs().mean() + ATOL[inputs.q.dtype] / 16
        assert ours.abs().mean() <= mean_limit, f"mean error {ours.abs().mean():.3e}, limit {mean_limit:.3e}"
    nothing = true_lse == -torch.inf
    assert ((lse[:n] == -torch.inf) == nothing).all(), "lse is -inf exactly for rows that see nothing"
    if not any(feature.output for feature in inputs.variant.features):
        assert (out[:n][nothing] == 0).all(), "a row that sees nothing is 0"
    pair = lse[:n].double()[~nothing], true_lse[~nothing]
    atol = lse_limit(inputs.variant, eager_lse, true_lse)
    torch.testing.assert_close(*pair, rtol=1e-5, atol=atol, equal_nan=not inputs.variant.softmax)


def check_attention(case: Case, device: str = "cpu", workers: int | None = None, **planner: Any) -> None:
    inputs = make(case, device)
    before = inputs.kv.k.clone(), inputs.kv.v.clone()
    plan = planner_for(inputs, workers, **planner).plan(inputs.batch)
    poison(plan)
    compare(inputs, *run_inputs(plan, inputs))
    for cache, old in zip((inputs.kv.k, inputs.kv.v), before, strict=True):
        assert torch.equal(cache.nan_to_num(1e9), old.nan_to_num(1e9)), "the cache was written"


def sharing_planner(inputs: Inputs, **changes: Any) -> Planner:
    """A planner that shares all that this batch's requests have in common."""
    tokens = max(1, *inputs.case.q_lens) * len(inputs.case.q_lens)
    wanted = {"levels": 8, "share": "always", "max_shared_tokens": tokens, "window": None}
    return planner_for(inputs, **(wanted | changes))


def check_shared(case: Case, device: str = "cpu", **planner: Any) -> None:
    """Composable formats, the prefixes found in page tables, against the oracle, and not for want of any."""
    inputs = make(case, device)
    made = sharing_planner(inputs, **planner)
    plan = made.plan(Composable(inputs.batch))
    assert made.finder is not None and int(made.finder.header[0]) > 0, "expected a case that shares"
    poison(plan)
    compare(inputs, *run_inputs(plan, inputs))


def refill(inputs: Inputs, other: Inputs) -> None:
    """Another batch into the same addresses, as an engine does between replays. What is behind it stays."""
    rows, width = other.batch.table.shape
    for mine, theirs in (
        (inputs.q, other.q),
        (inputs.kv.k, other.kv.k),
        (inputs.kv.v, other.kv.v),
        (inputs.batch.qo_indptr, other.batch.qo_indptr),
        (inputs.batch.kv_len, other.batch.kv_len),
        (inputs.batch.table[:, :width], other.batch.table[:rows]),
    ):
        mine[: len(theirs)].copy_(theirs)


ROOM = Case((1,) * 12, (1500,) * 12, q_heads=8, extra_tokens=0)
# requests and prefixes of batches that fit it
FOLLOWING = (
    (12, ((0, 12, 256), (2, 8, 640), (4, 3, 1280))),
    (5, ()),
    (4, ((0, 4, 640), (1, 3, 1152))),
    (1, ()),
    (12, ((0, 6, 512), (6, 6, 640))),
    (2, ((0, 2, 1024),)),
)
Capture = Callable[[Plan, Inputs, torch.Tensor, torch.Tensor], Callable[[], None]]


def bound(plan: Plan, room: Inputs, out: torch.Tensor, lse: torch.Tensor) -> Callable[[], None]:
    """A captured run, as far as a CPU has any: what it is launched with stays, plans change."""

    def replay() -> None:
        still = Plan(plan.planner, plan.batch, plan.planner.planned)
        run(still, room.q, room.kv, out, variant=room.variant, lse=lse)

    return replay


def check_follows(room: Inputs, planner: Planner, requests: int, capture: Capture) -> None:
    """A run captured on so many requests follows plans of fewer and of more, with prefixes and without.

    capture: of a plan, room, out and lse, returns what replays their run.
    """

    def first(n: int) -> Composable:
        batch = room.batch
        return Composable(replace(batch, qo_indptr=batch.qo_indptr[: n + 1], kv_len=batch.kv_len[:n]))

    out, lse = torch.full_like(room.out, float("nan")), torch.full_like(room.lse, float("nan"))
    replay = capture(planner.plan(first(requests)), room, out, lse)
    for n, prefixes in FOLLOWING:
        if requests == 1 and prefixes:
            continue  # captured without levels
        rng, most = random.Random(n), max([keys for *_, keys in prefixes], default=100)
        kv_lens = tuple(most + rng.randint(1, 1499 - most) for _ in range(n))
        case = replace(room.case, q_lens=(1,) * n, kv_lens=kv_lens, prefixes=prefixes, seed=n)
        refill(room, other := make(case, planner.device))
        plan = planner.plan(first(n))
        assert bool(plan.header[11]) == bool(prefixes), "places"
        poison(plan)
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        replay()
        compare(other, out, lse)


def check_repeats(case: Case, device: str = "cpu", times: int = 20) -> None:
    """Bitwise the same, planned and run again and again."""
    inputs = make(case, device)
    planner = planner_for(inputs)
    first = run_inputs(planner.plan(inputs.batch), inputs)
    for _ in range(times - 1):
        plan = planner.plan(inputs.batch)
        poison(plan)
        again = run_inputs(plan, inputs)
        n = inputs.tokens
        assert all(torch.equal(a[:n], b[:n]) for a, b in zip(first, again, strict=True)), "two runs differ"


def check_chain(case: Case, device: str = "cpu") -> None:
    """A tree without branches is causal attention, bit by bit."""
    inputs = make(replace(case, tree="chain"), device)
    plan = planner_for(inputs).plan(inputs.batch)
    tree = run_inputs(plan, inputs)
    inputs.variant_args = {k: v for k, v in inputs.variant_args.items() if not k.startswith("tree_")}
    causal = run_inputs(plan, inputs, variant=parse(case.variant.replace("+TREE", "")))
    n = inputs.tokens
    assert all(torch.equal(a[:n], b[:n]) for a, b in zip(tree, causal, strict=True))


def check_upper_bound(case: Case, device: str = "cpu", **planner: Any) -> None:
    """Planned with longer kv_len than the true one, as under asynchronous scheduling."""
    inputs = make(case, device)
    longer = make(
        replace(case, kv_lens=tuple(n + 150 * (i % 2) + 3 for i, n in enumerate(case.kv_lens))), device
    )
    true = inputs.batch.kv_len.clone()
    inputs.batch.kv_len.copy_(longer.batch.kv_len)
    plan = planner_for(longer, **planner).plan(inputs.batch)
    inputs.batch.kv_len.copy_(true)
    poison(plan)
    compare(inputs, *run_inputs(plan, inputs))


def check_append(case: Case, device: str = "cpu", tokens: int = 40) -> None:
    """Slots in any order, some skipped, k and v as slices of a fused projection; nothing else is touched."""
    kv = make(case, device).kv
    rng = torch.Generator().manual_seed(case.seed)
    slots = torch.randperm(kv.num_pages * kv.page_size, generator=rng)[:tokens]
    slots[::7] = -1
    n = len(slots)
    width = kv.head_dim_qk + kv.head_dim_vo + 16
    fused = torch.randn(n + 3, kv.kv_heads, width, generator=rng).to(
        kv.device, kv.dtype
    )  # three padded tokens
    k, v = fused[..., : kv.head_dim_qk], fused[..., -kv.head_dim_vo :]
    wanted = [kv.k.clone(), kv.v.clone()]
    for i, slot in enumerate(slots.tolist()):
        if slot >= 0:
            for cache, new in zip(wanted, (k, v), strict=True):
                cache[slot // kv.page_size, slot % kv.page_size] = new[i]
    append(kv, k, v, slots.to(kv.device))
    for cache, want in zip((kv.k, kv.v), wanted, strict=True):
        assert torch.equal(cache.nan_to_num(1e9), want.nan_to_num(1e9)), "append wrote something else"


def build(cases: list[Case], device: str, dtypes: tuple[str, ...], **flags: bool) -> None:
    """Compiles all that these cases run, several at once. flags: of their Specs."""
    arch = jit.arch_of(torch.device(device))
    jit.build_all(
        jit.needed(
            jit.Spec(arch, dtype, c.head_dim, c.head_dim_vo or c.head_dim, parse(c.variant), **flags)
            for c in cases
            for dtype in dtypes
        )
    )
