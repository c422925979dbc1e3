"""The promises of a plan, on the host planner."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import (
    FIRST,
    WIDE,
    Setup,
    arrays,
    batch_of,
    check_cover,
    check_numbering,
    item_costs,
    setups,
    worker_loads,
)

from fi_backend.plan import Planner, Tiles, cost_model

quick = settings(max_examples=80, deadline=None)
# Llama-3.1-8B's heads on the sm90 executor; lengths by replace()
LLAMA_ON_H100 = Setup((), (), kv_heads=8, group=4, workers=132, q_wide=128, q_narrow=64, tile_kv=128, room=90)


@given(setups(batch_invariant=None))
@settings(max_examples=200, deadline=None)
def test_every_pair_once_and_every_split_merged(s: Setup) -> None:
    plan = arrays(s.planner().plan(s.batch()))
    check_cover(s, plan)
    check_numbering(s, plan)


@given(setups(batch_invariant=None), st.data())
@quick
def test_right_for_every_length_below_the_planned_one(s: Setup, data: st.DataObject) -> None:
    plan = arrays(s.planner().plan(s.batch()))
    true = tuple(data.draw(st.integers(0, kv)) for kv in s.kv_lens)
    check_cover(s, plan, true)


@given(setups(batch_invariant=None), setups())
@quick
def test_shapes_and_addresses_depend_on_capacity_only(s: Setup, other: Setup) -> None:
    q_lens, kv_lens = s.q_lens + other.q_lens, s.kv_lens + other.kv_lens
    capacity = {
        "max_requests": len(q_lens) or 1,
        "max_tokens": sum(q_lens) or 1,
        "max_kv_len": max((*kv_lens, 1)),
    }
    planner = s.planner(**capacity)

    def buffers(plan: object) -> list[tuple[int, torch.Size]]:
        names = ("header", "worker_indptr", "items", "merges", "partial_o", "partial_lse")
        return [(x.data_ptr(), x.shape) for x in (getattr(plan, n) for n in names)]

    before = buffers(planner)
    for batch in (s.batch(), other.batch(), batch_of(q_lens, kv_lens), batch_of((), ())):
        plan = planner.plan(batch)
        assert buffers(plan) == before
        a = arrays(plan)
        layout = planner.layout
        assert len(a.items) <= layout.max_items and len(a.merges) <= layout.max_merges
        assert a.slots <= layout.max_slots and a.segments <= layout.max_segments


@given(setups(q_narrow=4, q_wide=8), st.integers(1, 8), st.integers(1, 60))
@quick
def test_capacities_hold_for_any_split_of_the_tokens(s: Setup, requests: int, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    planner = s.planner(max_requests=requests, max_tokens=tokens)
    for _ in range(10):
        q_lens = rng.multinomial(tokens, rng.dirichlet(np.full(requests, 0.5)))
        plan = planner.plan(batch_of(tuple(q_lens), tuple(rng.integers(0, 500, requests))))
        plan.check()
        assert arrays(plan).segments <= planner.layout.max_segments


@given(setups())
@quick
def test_load_is_at_most_the_mean_and_one_item(s: Setup) -> None:
    cost = cost_model(s.room)
    plan = arrays(s.planner().plan(s.batch()))
    share = max(plan.total / s.workers, cost.min_slice)
    slack = share / cost.spread_slack if (plan.items[:, 6] & WIDE).any() else 0
    assert worker_loads(s, plan, cost).max() <= share + slack + cost.uncut


@given(setups(batch_invariant=True))
@quick
def test_load_of_whole_items_is_at_most_the_mean_and_one_item(s: Setup) -> None:
    cost = cost_model(s.room)
    plan = arrays(s.planner().plan(s.batch()))
    largest = item_costs(s, plan, cost).max(initial=0)
    assert worker_loads(s, plan, cost).max() <= max(plan.total / s.workers, cost.min_slice) + largest


@given(setups(batch_invariant=None))
@quick
def test_untouched_past_the_counts(s: Setup) -> None:
    planner = s.planner()
    planner._buffer.fill_(0xAB)
    plan = planner.plan(s.batch())
    a = arrays(plan)
    poison = int(np.frombuffer(b"\xab" * 4, np.int32)[0])
    assert (plan.items[len(a.items) :] == poison).all() and (plan.merges[len(a.merges) :] == poison).all()


@given(setups(batch_invariant=None))
@quick
def test_same_bytes_each_time(s: Setup) -> None:
    first, second = s.planner(), s.planner()
    second.plan(batch_of((3,), (7,)) if second.max_tokens >= 3 and not s.batch_invariant else s.batch())
    for planner in (first, second):
        planner._buffer.fill_(1)
        planner.plan(s.batch())
    assert torch.equal(first._buffer, second._buffer)


@given(setups(batch_invariant=True), setups(batch_invariant=True), st.integers(0, 8))
@quick
def test_batch_invariance(s: Setup, rest: Setup, place: int) -> None:
    """A request's tiles and pieces, in KV order, whatever stands before and after it."""
    at = min(place, len(rest.q_lens))
    lengths = list(zip(rest.q_lens, rest.kv_lens, strict=True))
    own = list(zip(s.q_lens, s.kv_lens, strict=True))
    joined = lengths[:at] + own + lengths[at:]
    crowd = replace(
        s, q_lens=tuple(q for q, _ in joined), kv_lens=tuple(k for _, k in joined), workers=rest.workers
    )
    alone = arrays(s.planner().plan(s.batch()))
    together = arrays(crowd.planner().plan(crowd.batch()))
    check_cover(crowd, together)

    def pieces(items: np.ndarray, shift: int) -> list[list[int]]:
        mine = items[(items[:, 0] >= shift) & (items[:, 0] < shift + len(own))]
        return [[r - shift, row, h, b, e, flags] for r, row, h, b, e, _, flags, _ in mine.tolist()]

    assert pieces(alone.items, 0) == pieces(together.items, at)


@given(setups(batch_invariant=True, tile_kv=1))
@quick
def test_invariant_items_are_wide_and_chunked_by_position(s: Setup) -> None:
    """Whole row tiles of many rows; those of a narrow tile in chunks of their own keys. One code for all."""
    chunk = cost_model(s.room).chunk_tiles * s.tile_kv
    for request, _, _, begin, end, slot, flags, _ in arrays(s.planner().plan(s.batch())).items.tolist():
        assert flags & WIDE
        if s.q_lens[request] * s.group <= s.q_narrow:
            assert begin // chunk == max(end - 1, begin) // chunk
        else:
            assert slot == -1 and flags & FIRST


def test_workspace_is_exact_and_knows_no_group() -> None:
    tiles = Tiles(q_wide=64, q_narrow=16, kv=64, workers=264)
    llama = {
        "kv_heads": 8,
        "head_dim": 128,
        "max_requests": 256,
        "max_tokens": 8192,
        "device": "cpu",
        "tiles": tiles,
    }
    slots = 2 * (264 - 1)
    for group in (1, 4, 16):
        planner = Planner(q_heads=8 * group, **llama)
        assert planner.layout.max_slots == slots
        assert planner.workspace_bytes == slots * 64 * (128 + 1) * 4
    decode = Planner(q_heads=32, **(llama | {"max_tokens": 256}))
    assert decode.plan_bytes + decode.workspace_bytes < 20e6  # 256 requests, any context length
    invariant = Planner(q_heads=32, batch_invariant=True, max_kv_len=40960, **llama)
    rows = 256 * 8 * 40960 // 2048 * 16 + 264 * 64  # of chunked decodes, and of what each worker works on
    assert invariant.partial_o.shape == (rows, 128) and invariant.workspace_bytes == rows * (128 + 2) * 4


def test_workspace_bound_is_reached() -> None:
    """Each cut falls into a tile of its own: two partial states a cut, all of them needed."""
    s = Setup((1,) * 4, (400,) * 4, workers=3)
    planner = s.planner()
    assert arrays(planner.plan(s.batch())).slots == planner.layout.max_slots == 4


def test_partial_states_lie_in_the_workspace_given() -> None:
    s = Setup((1,), (1000,), workers=8)
    wanted = s.planner().workspace_bytes
    workspace = torch.empty(wanted // 4 + 1, dtype=torch.float32)
    planner = s.planner(workspace=workspace)
    low, high = workspace.data_ptr(), workspace.data_ptr() + 4 * workspace.numel()
    for x in (planner.partial_o, planner.partial_lse):
        assert low <= x.data_ptr() and x.data_ptr() + 4 * x.numel() <= high
    with pytest.raises(ValueError, match=f"at least {wanted} bytes, got {wanted - 4}"):
        s.planner(workspace=workspace[: wanted // 4 - 1])


def test_narrow_and_wide_tiles_in_one_plan() -> None:
    s = Setup((1, 16, 1), (100, 40, 0), group=4, q_wide=8, q_narrow=4)
    items = arrays(s.planner().plan(s.batch())).items
    narrow = items[items[:, 6] & 1 == 0]
    assert set(narrow[:, 0]) == {0, 2} and set(items[items[:, 6] & 1 == 1][:, 0]) == {1}
    empty = items[items[:, 0] == 2]
    assert empty.tolist() == [[2, 0, 0, 0, 0, -1, FIRST, 0]]  # its row is still written


@pytest.mark.parametrize("q_lens, kv_lens", [((), ()), ((0, 0), (5, 0)), ((0, 3, 0, 0), (0, 3, 0, 9))])
def test_empty_batches_and_padded_rows(q_lens: tuple[int, ...], kv_lens: tuple[int, ...]) -> None:
    s = Setup(q_lens, kv_lens, kv_heads=2)
    plan = arrays(s.planner().plan(s.batch()))
    check_cover(s, plan)
    assert len(plan.items) == 2 * sum(q > 0 for q in q_lens)


def test_fewer_tiles_than_workers_are_spread_evenly() -> None:
    """16 decodes of 16 KV tiles, 8 heads, 264 workers: two halves each, nobody has a third piece."""
    s = Setup((1,) * 16, (1024,) * 16, kv_heads=8, workers=264, q_wide=64, q_narrow=16, tile_kv=64)
    plan = arrays(s.planner().plan(s.batch()))
    assert (np.diff(plan.worker_indptr)[:256] == 1).all() and len(plan.items) == 256
    assert set((plan.items[:, 4] - plan.items[:, 3]).tolist()) == {512}


def test_long_prefix_is_read_in_step() -> None:
    """512 rows over 32768 keys: a worker for each row tile, though 132 even slices would be 3 % shorter."""
    s = replace(LLAMA_ON_H100, q_lens=(512,), kv_lens=(32768,))
    plan = arrays(s.planner().plan(s.batch()))
    assert len(plan.items) == 128 and plan.slots == 0 and not plan.items[:, 3].any()


def test_rests_of_row_tiles_come_last() -> None:
    """Row tiles that are cut: what the worker before left over is reached when the others get there."""
    s = replace(LLAMA_ON_H100, q_lens=(832,), kv_lens=(32768,))
    plan = arrays(s.planner().plan(s.batch()))
    assert plan.rounds == 1 and len(plan.merges) > 100
    first, last = plan.worker_indptr[:-1], plan.worker_indptr[1:] - 1
    assert not plan.items[first[first < last], 3].any()
    assert (plan.items[last, 3] > 0).sum() >= len(plan.merges)


def test_rounds_keep_workers_at_neighbouring_row_tiles() -> None:
    """In every round all workers together are in one part of the line, and each load stays even."""
    s = replace(LLAMA_ON_H100, q_lens=(2048,) * 4, kv_lens=(2048,) * 4)
    plan = arrays(s.planner().plan(s.batch()))
    assert plan.rounds == 8 and plan.slots <= 2 * 132
    costs = item_costs(s, plan, cost_model(s.room))
    for part in np.split(plan.worker_indptr[:-1], plan.rounds)[1:]:
        before = costs[: part[0]].sum() / plan.total
        assert abs(before * plan.rounds - round(before * plan.rounds)) < 0.02
    loads = worker_loads(s, plan, cost_model(s.room))
    assert loads.max() - loads.min() <= costs.max()
    one_round = replace(s, room=80)
    assert arrays(one_round.planner().plan(s.batch())).rounds == 1


def test_workers_are_at_row_tiles_whose_windows_overlap() -> None:
    s = replace(LLAMA_ON_H100, q_lens=(16384,) * 4, kv_lens=(16384,) * 4, window=1024)
    plan = arrays(s.planner().plan(s.batch()))
    assert np.diff(plan.worker_indptr).max() * s.q_wide // s.group <= s.window // 4


def test_window_keeps_only_its_tiles() -> None:
    s = Setup((1,), (4096,), window=10, workers=1)
    assert arrays(s.planner().plan(s.batch())).items[:, 3:5].tolist() == [[4084, 4096]]


def test_lengths_too_long_for_32_bit_costs() -> None:
    s = Setup((4096, 1), (1 << 29, 1 << 30), kv_heads=8, workers=16, max_tokens=5000)
    plan = arrays(s.planner().plan(s.batch()))
    cost = cost_model(s.room)
    assert plan.total > 1 << 32
    assert worker_loads(s, plan, cost).max() <= plan.total / s.workers + cost.uncut
    assert plan.items[:, 4].max() == 1 << 30


def test_rebind_shares_the_work_items() -> None:
    s = Setup((2, 1), (30, 9))
    plan = s.planner().plan(s.batch())
    other = s.batch()
    bound = plan.rebind(other)
    assert bound.batch is other and bound.items is plan.items and bound.planner is plan.planner
    with pytest.raises(ValueError, match="expected a batch of 2 requests, got 1"):
        plan.rebind(batch_of((2,), (30,)))
    with pytest.raises(ValueError, match="planned lengths"):
        plan.rebind(batch_of((2, 1), (30, 10)))


BASE = Setup((2, 1), (30, 9))


def test_the_largest_group_of_rows_that_is_accepted() -> None:
    """max_tokens * group^2 just below 2^32, where the GPU's reciprocal of the group is still exact."""
    tokens, group = ((1 << 32) - 1) // 127**2, 127
    BASE.planner(q_heads=group, max_tokens=tokens)
    with pytest.raises(ValueError, match=f"got {tokens + 1} \\* 127\\^2"):
        BASE.planner(q_heads=group, max_tokens=tokens + 1)
    reciprocal = ((1 << 32) - 1) // group + 1
    rows = np.arange(tokens * group - 10 * group, tokens * group, dtype=np.uint64)
    assert (rows * np.uint64(reciprocal) >> np.uint64(32) == rows // np.uint64(group)).all()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"q_heads": 5, "kv_heads": 2}, "q_heads a multiple of kv_heads, got 5 and 2"),
        ({"q_heads": 129, "kv_heads": 1}, "q_heads / kv_heads from 1 to 128, got 129"),
        ({"head_dim": 0}, "head_dim to be a multiple of 8 from 8 to 256, got 0"),
        ({"max_requests": 0}, "max_requests from 1 to"),
        ({"max_tokens": 0}, "max_tokens from 1 to"),
        ({"max_tokens": 2**31}, "max_tokens from 1 to"),
        (
            {"max_tokens": 2**30, "q_heads": 2},
            r"max_tokens \* group of at most 2147483639, got 1073741824 \* 2",
        ),
        ({"window": 2**31 - 1}, "window from 0 to 1073741824, got 2147483647"),
        (
            {"q_heads": 1 << 7, "max_tokens": 1 << 18},
            r"max_tokens \* group\^2 below 2\^32, got 262144 \* 128\^2",
        ),
        ({"max_kv_len": 0}, "max_kv_len of at least 1 token"),
        ({"window": 0}, "window of at least 1 token"),
        ({"batch_invariant": True}, "needs max_kv_len"),
        ({"tiles": Tiles(64, 16, 64, 0)}, "workers from 1 to 512, got 0"),
        ({"tiles": Tiles(16, 64, 64, 4)}, "tiles.q_narrow from 0 to 16, got 64"),
        (
            {"kv_heads": 1 << 20, "q_heads": 1 << 20, "max_tokens": 1 << 12, "max_requests": 1 << 12},
            "fewer than 2\\^28 work items",
        ),
        (
            {"kv_heads": 1 << 14, "q_heads": 1 << 14, "max_tokens": 1 << 30, "max_requests": 1 << 30}
            | {"batch_invariant": True, "max_kv_len": 1 << 30},
            "fewer than 2\\^28 work items, got up to \\d+:",
        ),
    ],
)
def test_configurations_that_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BASE.planner(**changes)


def test_batches_that_are_refused() -> None:
    planner = BASE.planner(max_kv_len=100)
    with pytest.raises(ValueError, match=r"at most 2 requests \(max_requests\), got 3"):
        planner.plan(batch_of((1, 1, 1), (9, 9, 9)))
    with pytest.raises(ValueError, match=r"at most 3 query tokens \(max_tokens\), got 6"):
        planner.plan(batch_of((5, 1), (9, 9)))
    with pytest.raises(ValueError, match="kv_len from 0 to 100, got 101 at request 1"):
        planner.plan(batch_of((1, 1), (100, 101)))
    with pytest.raises(ValueError, match="kv_len from 0 to 100, got -1 at request 0"):
        planner.plan(batch_of((1, 1), (-1, 1)))
    negative = batch_of((1, 1), (9, 9))
    negative.qo_indptr.sub_(1)
    with pytest.raises(ValueError, match="qo_indptr not to be negative, got -1 at its start"):
        planner.plan(negative)
    with pytest.raises(ValueError, match="not to decrease, got 2 then 1 at request 1"):
        planner.plan(batch_of((2, -1), (9, 9)))
    with pytest.raises(ValueError, match=r'on="device" or on="host", got \'gpu\''):
        planner.plan(BASE.batch(), on="gpu")


def test_tiles_of_a_large_host_stay_within_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 384)
    tiles = Tiles.for_device("cpu", 64, 64)
    assert tiles.workers == 512
    BASE.planner(tiles=tiles)
