"""Composable formats: plans of trees of prefixes, and attention over them on the CPU, against the oracle."""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass, replace
from typing import Any

import checks
import numpy as np
import pytest
import torch
from cases import Case, make
from grid import SHARED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plans import FIRST, WIDE, Setup, allowed, arrays, setups
from test_plan_device import emulator as emulator
from test_plan_device import plan_as_device

from fi_backend import BlockSparse, Composable, Plan, Planner
from fi_backend.show.schedule import Schedule
from fi_backend.variants import CAUSAL, WINDOW, parse

SLOW = [HealthCheck.function_scoped_fixture]
Tree = list[tuple[list[int], int]]  # requests and keys of each prefix


def random_tree(s: Setup, rng: random.Random, levels: int) -> Tree:
    """Prefixes of whole tiles before the query tokens of their requests, some of one request alone."""
    room = [max(k - q, 0) // s.tile_kv if q else 0 for q, k in zip(s.q_lens, s.kv_lens, strict=True)]
    tree: Tree = []

    def grow(requests: list[int], begin: int, depth: int) -> None:
        requests = [r for r in requests if room[r] > begin]
        rng.shuffle(requests)
        while requests and depth < levels - 1:
            group, requests = requests[: (n := rng.randint(1, len(requests)))], requests[n:]
            if rng.random() < 0.2 or len(tree) == len(s.q_lens):  # as many as a planner takes
                continue
            end = rng.randint(begin + 1, min(room[r] for r in group))
            tree.append((group, end * s.tile_kv))
            grow(group, end, depth + 1)

    grow(list(range(len(s.q_lens))), 0, 0)
    return tree


def one_page(s: Setup) -> BlockSparse:
    """A batch of which all keys may be shared."""
    table = torch.zeros(max(len(s.q_lens), 1), -(-max(*s.kv_lens, 1, 1) // 16), dtype=torch.int32)
    batch = s.batch()
    return BlockSparse.from_block_table(batch.qo_indptr, batch.kv_len, table, 16)


def sharing(s: Setup, levels: int) -> Planner:
    longest = max(*s.kv_lens, 1, 1)
    tokens = max(sum(s.q_lens), len(s.q_lens), 1)
    return s.planner(levels=levels, max_shared_tokens=tokens, max_kv_len=longest, max_tokens=tokens)


@dataclass
class Nodes:
    """What a plan with levels holds besides its items, read back."""

    prefixes: list[list[int]]
    places: list[list[int]]
    parts: np.ndarray  # [places, levels, 2]
    segment_rows: np.ndarray
    unit_cuts: np.ndarray
    first_slot: int
    state_rows: int

    @classmethod
    def of(cls, planner: Planner) -> Nodes:
        finder, layout, levels = planner.finder, planner.layout, planner.levels
        assert finder is not None
        prefixes, places = finder.header[:2].tolist()
        segments = int(planner.header[3])

        def view(offset: int, n: int) -> np.ndarray:
            return planner._buffer[offset : offset + 4 * n].view(torch.int32).numpy().copy()

        return cls(
            finder.prefixes[:prefixes].tolist(),
            finder.places[:places].tolist(),
            view(layout.parts, places * levels * 2).reshape(places, levels, 2),
            view(layout.segment_rows, segments),
            view(layout.unit_cuts, segments * planner.kv_heads + 1),
            layout.first_slot,
            int(planner.header[10]),
        )


def read_by_merge(s: Setup, planner: Planner, nodes: Nodes, place: int, head: int) -> list[int]:
    """Partial states that make up a row, as csrc/smxx/merge_places.cuh finds them."""
    kv_head, found = head // s.group, []
    for segment, row in nodes.parts[place].tolist():
        if segment < 0:
            break
        packed, width = row // 2 + head % s.group, s.width[bool(row & 1)]
        segment += packed // width
        unit = kv_head * len(nodes.segment_rows) + segment
        before, after = nodes.unit_cuts[unit : unit + 2].tolist()
        slots = nodes.first_slot + (before >> 16) + (before & 0xFFFF)
        found.append(kv_head * nodes.state_rows + int(nodes.segment_rows[segment]) + packed % width)
        for i in range(1, 1 + (after >> 16) - (before >> 16)):
            found.append((slots + i) * s.q_wide + packed % width)
    return found


def check_levels(s: Setup, made: Plan) -> None:
    """Every allowed (row, key) pair is read once, and each row is made of the states that were written."""
    planner = made.planner
    plan, nodes = arrays(made), Nodes.of(planner)
    qo_indptr = np.cumsum((0, *s.q_lens))
    of_token = np.repeat(np.arange(len(s.q_lens)), s.q_lens)
    reads = [
        np.zeros((q * s.group * s.kv_heads, kv), np.int32) for q, kv in zip(s.q_lens, s.kv_lens, strict=True)
    ]
    levels = planner.shares(made.batch)
    shared = {token: i for i, (token, _) in enumerate(nodes.places if levels else [])}
    written: dict[tuple[int, int], list[int]] = {}  # of token and head: states; -1: the output

    def rows_of(request: int, kv_head: int, begin: int, width: int) -> list[tuple[int, int]]:
        if request >= 0:
            tokens: Any = range(qo_indptr[request], qo_indptr[request + 1])
        else:
            first, count = nodes.prefixes[~request][:2]
            tokens = [token for token, _ in nodes.places[first : first + count]]
        packed = [(int(t), kv_head * s.group + g) for t in tokens for g in range(s.group)]
        return packed[begin : begin + width]

    states: set[int] = set()
    drawn = Schedule(made)
    for n, (named, row, kv_head, begin, end, slot, flags, level) in enumerate(plan.items.tolist()):
        assert begin % s.tile_kv == 0 and end % s.tile_kv == 0 and 0 <= begin <= end
        assert level < planner.levels
        rows = rows_of(named, kv_head, row, s.width[bool(flags & WIDE)])
        assert drawn.rows[n] == len(rows)
        what = f"request {named}" if named >= 0 else f"prefix of {nodes.prefixes[~named][5]} requests"
        assert what in drawn.describe(n)
        for i, (token, head) in enumerate(rows):
            request = int(of_token[token])
            at = head * s.q_lens[request] + token - int(qo_indptr[request])
            reads[request][at, 0 if flags & FIRST else begin : end] += 1
            state = -1 if slot == -1 else i + (-2 - slot if slot < 0 else slot * s.q_wide)
            assert state not in states, "a state is written twice"
            states |= {state} - {-1}
            written.setdefault((token, head), []).append(state)
    for request, count in enumerate(reads):
        mask = allowed(replace(s, group=1), s.q_lens[request], s.kv_lens[request])
        mask = np.tile(mask, (s.group * s.kv_heads, 1))
        assert (count[mask] == 1).all(), f"request {request}: {np.argwhere((count != 1) & mask)[:3]}"
    merged: dict[tuple[int, int], list[int]] = {}
    for request, row, kv_head, begin, end, *_, flags, _ in plan.merges.tolist():
        if request >= 0:
            for i, at in enumerate(rows_of(request, kv_head, row, s.width[bool(flags & WIDE)])):
                merged[at] = [slot * s.q_wide + i for slot in range(begin, end)]
    for token, place in shared.items():
        for head in range(s.group * s.kv_heads):
            assert (token, head) not in merged, "a row is merged twice"
            merged[token, head] = read_by_merge(s, planner, nodes, place, head)
    assert len(written) == sum(s.q_lens) * s.group * s.kv_heads
    for at, of_row in written.items():
        assert sorted(of_row) == sorted(merged.get(at, [-1]))


LEVELS = {"window": None, "batch_invariant": False}


@given(setups(**LEVELS), st.randoms(use_true_random=False), st.integers(2, 8))
@settings(max_examples=150, deadline=None)
def test_exact_cover(s: Setup, rng: random.Random, levels: int) -> None:
    planner = sharing(s, levels)
    planner._buffer.fill_(0xAB)
    check_levels(s, planner.plan(Composable(one_page(s), random_tree(s, rng, levels))))


@given(setups(**LEVELS), st.randoms(use_true_random=False), st.integers(2, 8), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
def test_same_bytes(emulator: ctypes.CDLL, s: Setup, rng: random.Random, levels: int, seed: int) -> None:
    check_same_bytes(emulator, s, rng, levels, seed)


def check_same_bytes(emulator: ctypes.CDLL, s: Setup, rng: random.Random, levels: int, seed: int) -> None:
    host, device, tree = sharing(s, levels), sharing(s, levels), random_tree(s, rng, levels)
    for planner in (host, device):
        planner._buffer.fill_(0xAB)
        planner.plan(Composable(one_page(s), tree))
    used = host._buffer.clone()
    device._buffer.fill_(0xAB)
    plan_as_device(emulator, device, s.batch(), seed)
    # where executors find the levels: addresses, of two planners
    at = host.layout.levels_for_run
    used[at : at + 64] = device._buffer[at : at + 64] = 0
    assert torch.equal(used, device._buffer)


@pytest.mark.parametrize("room", [80, 90])
def test_same_bytes_of_large_batches(emulator: ctypes.CDLL, room: int) -> None:
    for s in (
        Setup((1,) * 1000, (700,) * 1000, kv_heads=2, group=4, workers=132, room=room),
        Setup((3, 900, 1) * 100, (400, 950, 300) * 100, workers=264, room=room),
    ):
        check_same_bytes(emulator, s, random.Random(1), 5, 7)


def case_of(rng: random.Random, scale: int = 1, **changes: Any) -> Case:
    """Three levels and more with mixed fan-out; chunks, verify rows and requests that share nothing.

    scale: of the prefixes' lengths.
    """
    q_lens, kv_lens, prefixes = [], [], []

    def grow(first: int, begin: int, depth: int) -> int:
        """A subtree of requests from `first` on that have `begin` keys in common. Returns its end."""
        end, keys = first, begin + scale * rng.choice((64, 128, 200, 64 * rng.randint(1, 4)))
        for _ in range(rng.randint(1 + (depth == 1), 3)):
            if depth < 4 and rng.random() < 0.5:
                end = grow(end, keys, depth + 1)
            else:
                q_lens.append(rng.choice((1, 1, 1, 2, 5, rng.randint(1, 40))))
                kv_lens.append(keys + q_lens[-1] + rng.randint(0, 150))
                end += 1
        prefixes.append((first, end - first, keys))
        return end

    end = 0
    for _ in range(rng.randint(1, 2)):
        end = grow(end, 0, 1)
        if rng.random() < 0.5:  # shares nothing, perhaps has nothing
            q_lens.append(rng.randint(0, 3))
            kv_lens.append(rng.choice((0, 1, 150)))
            end += 1
    group = rng.choice((1, 2, 4))
    drawn: dict[str, Any] = {
        "q_heads": 2 * group,
        "kv_heads": 2,
        "head_dim": 16,
        "page_size": rng.choice((1, 3, 16, 32)),
        "table": rng.choice(("block", "token", "csr")),
        "dtype": rng.choice(("bf16", "f32")),
        "variant": rng.choice(("CAUSAL", "CAUSAL", "CAUSAL+ALIBI", "CAUSAL+WINDOW", "CAUSAL+SINKS", "FULL")),
        "seed": rng.randrange(1 << 30),
    }
    outermost_first = tuple(sorted(prefixes, key=lambda p: p[2]))
    return Case(tuple(q_lens), tuple(kv_lens), prefixes=outermost_first, **(drawn | changes))


@given(st.randoms(use_true_random=False), st.integers(2, 8), st.integers(1, 20))
@settings(max_examples=1000, deadline=None)
def test_random_trees(rng: random.Random, levels: int, workers: int) -> None:
    checks.check_shared(case_of(rng), levels=levels, workers=workers)


@pytest.mark.parametrize(
    "variant", ["CAUSAL", "CAUSAL+SIGMOID", "CAUSAL+WINDOW+SOFT_CAP+ALIBI+SINKS", "CAUSAL+TREE"]
)
def test_variants(variant: str) -> None:
    case = replace(SHARED, variant=variant)
    checks.check_shared(replace(case, q_lens=(1, 1, 1, 4, 1, 7, 1, 1)) if "TREE" in variant else case)


@pytest.mark.parametrize("requests", [1, 2, 12])
def test_follows_other_numbers_of_requests(requests: int) -> None:
    room = make(replace(checks.ROOM, head_dim=16))
    planner = checks.sharing_planner(room, workers=7, levels=4)
    checks.check_follows(room, planner, requests, checks.bound)


def test_a_wrong_hint_is_found() -> None:
    inputs = make(SHARED)
    planner = checks.sharing_planner(inputs)
    with pytest.raises(ValueError, match=r"prefix of 320 keys: expected entry 0 of request 7's page table"):
        planner.plan(Composable(inputs.batch, [([0, 7], 320)]))


def test_the_oracle_notices_a_wrong_tree() -> None:
    """The negative control: a prefix that is none, past the check of hints."""
    inputs = make(SHARED)
    planner = checks.sharing_planner(inputs)
    assert planner.finder is not None
    plan = planner.plan(Composable(inputs.batch, [([0, 1], 192)]))
    planner.finder.places[1] = torch.tensor([79, 7])  # of request 1
    with pytest.raises(AssertionError, match=r"error|NaN"):
        checks.compare(inputs, *checks.run_inputs(plan, inputs))


def test_plans_of_one_planner() -> None:
    """Shared, flat, hinted and flat again; bitwise as before, and no other page table may use them."""
    inputs = make(SHARED)
    planner = checks.sharing_planner(inputs)
    outs = {}
    for name in ("shared", "flat", "hinted", "shared", "flat"):
        hints = {"flat": inputs.batch, "hinted": Composable(inputs.batch, [(range(7), 192)])}
        plan = planner.plan(hints.get(name, Composable(inputs.batch)))
        checks.poison(plan)
        out, lse = checks.run_inputs(plan, inputs)
        checks.compare(inputs, out, lse)
        n = inputs.tokens
        assert torch.equal(outs.setdefault(name, out[:n]), out[:n])
    with pytest.raises(ValueError, match="expected a planner of levels=1 to rebind, got 8"):
        plan.rebind(inputs.batch)
    shared = planner.plan(Composable(inputs.batch))
    planner.plan(Composable(replace(inputs.batch, table=inputs.batch.table.clone())))
    with pytest.raises(ValueError, match="expected the last plan of its planner"):
        checks.run_inputs(shared, inputs)


def test_saved_in_all() -> None:
    inputs = make(SHARED)
    planner = checks.sharing_planner(inputs)
    finder = planner.finder
    assert finder is not None
    for n in range(1, 4):
        planner.plan(Composable(inputs.batch))
        assert int(finder.saved_in_all) == n * int(finder.header[2:].view(torch.int64)) > 0
        planner.plan(inputs.batch)


def refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checks.sharing_planner(make(SHARED), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": 0}, "expected max_depth from 1 to 7, got -1"),
        ({"levels": 9}, "expected max_depth from 1 to 7, got 8"),
        ({"max_kv_len": None}, "expected max_kv_len with levels of 8, got None"),
        ({"window": 64}, "expected levels, batch_invariant, skip or window, got levels of 8 and another"),
        ({"batch_invariant": True}, "expected levels, batch_invariant, skip or window, got levels of 8"),
        ({"causal": None, "skip": CAUSAL}, "expected levels, batch_invariant, skip or window"),
        ({"max_shared_tokens": 3}, r"expected max_shared_tokens from 8 \(max_requests\)"),
        ({"max_requests": 1025, "max_tokens": 2000}, "expected max_requests from 1 to 1024, got 1025"),
        ({"share": "on"}, 'expected share="auto" or share="always", got \'on\''),
    ],
)
def test_planners_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    refused(changes, message)


def test_what_does_not_go_together() -> None:
    inputs = make(SHARED)
    planner, flat = checks.sharing_planner(inputs), checks.planner_for(inputs)
    with pytest.raises(
        ValueError, match="expected a planner with levels of at least 2 for a Composable batch"
    ):
        flat.plan(Composable(inputs.batch))
    with pytest.raises(ValueError, match='expected on="device" with levels of 8, got on='):
        planner.plan(Composable(inputs.batch), on="host")
    with pytest.raises(TypeError, match="expected batch to be a BlockSparse, got Composable"):
        Composable(Composable(inputs.batch))  # type: ignore[arg-type]
    plan = planner.plan(Composable(inputs.batch))
    with pytest.raises(
        ValueError, match=r"expected a variant without key and value transforms.*got \['ROPE'\]"
    ):
        checks.run_inputs(plan, inputs, variant=parse("CAUSAL+ROPE"))
    inputs.variant_args = {"window": 40}
    inputs.variant = CAUSAL + WINDOW  # of the variant alone: rows mask what they do not see
    checks.compare(inputs, *checks.run_inputs(plan, inputs))
