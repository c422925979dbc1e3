"""The device planner's text, run by host threads, against the host planner's bytes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import emulated
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plans import Setup, arrays, batch_of, setups
from test_skip import SKIPS, arguments, skipping

from fi_backend import jit
from fi_backend.plan import Plan, Planner
from fi_backend.variants import CAUSAL, TREE, Variant


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated.library("plan.cpp", tmp_path_factory.mktemp("emulate"), jit.csrc())


@pytest.fixture(scope="module")
def listers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Variant], ctypes.CDLL]:
    @functools.cache
    def lister(variant: Variant) -> ctypes.CDLL:
        folder = tmp_path_factory.mktemp("emulate")
        (folder / "fi_spec.h").write_text(jit.tile_lister_library(90, variant).header)
        return emulated.library("tile_list.cpp", folder, folder, jit.csrc())

    return lister


def plan_as_device(
    emulator: ctypes.CDLL,
    planner: Planner,
    batch: Any,
    seed: int,
    lister: ctypes.CDLL | None = None,
    **args: Any,
) -> None:
    if lister is not None:
        lister.set_seed(seed)
        found = emulated.address(lister.fi_tile_list), emulated.address(lister.fi_error)
        planner._lister = jit.TileLister(*found)
        planner.list_tiles(batch, "device", args)
    emulator.set_seed(seed)
    function, error = emulated.address(emulator.fi_plan), emulated.address(emulator.fi_error)
    jit.core().plan_device(planner._config, planner._buffer, batch.qo_indptr, batch.kv_len, function, error)


def check_same_bytes(emulator: ctypes.CDLL, s: Setup, seed: int, **capacity: Any) -> None:
    host, device = s.planner(**capacity), s.planner(**capacity)
    host._buffer.fill_(0xAB), device._buffer.fill_(0xAB)
    host.plan(s.batch())
    plan_as_device(emulator, device, s.batch(), seed)
    assert torch.equal(host._buffer, device._buffer)


@given(setups(batch_invariant=None), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_same_bytes(emulator: ctypes.CDLL, s: Setup, seed: int) -> None:
    check_same_bytes(emulator, s, seed)


LARGE = {
    "requests beyond a round": Setup((1,) * 1100 + (0, 7) * 20, (70,) * 1140, workers=264),
    "segments beyond shared memory": Setup(
        (1, 9000, 1, 7000, 0), (3000, 9000, 5, 10000, 1), group=2, workers=132
    ),
    "rounds and shared memory": Setup((0, 3, 11) * 900, (11, 300, 50) * 900, workers=512, kv_heads=3),
    "dealt out in rounds": Setup((700, 1, 900), (700, 90, 2000), kv_heads=4, workers=20, room=90),
    "more rounds than the executor walks": Setup((3000,), (3000,), kv_heads=8, workers=1, room=90),
    "chunks of a long request": replace(
        Setup((1, 3, 20), (60000, 7, 800), kv_heads=2, workers=100, tile_kv=1), batch_invariant=True
    ),
    "chunks beyond shared memory": replace(
        Setup((1,) * 40, tuple(range(50, 40050, 1000)), workers=264, tile_kv=2), batch_invariant=True
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_same_bytes_of_large_batches(emulator: ctypes.CDLL, name: str) -> None:
    s = LARGE[name]
    check_same_bytes(emulator, s, 1)
    check_same_bytes(emulator, s, 2, max_requests=5000, max_tokens=50000)


def test_same_bytes_at_capacity(emulator: ctypes.CDLL) -> None:
    rng = np.random.default_rng(0)
    for seed in range(5):
        q_lens = tuple(rng.multinomial(2000, rng.dirichlet(np.full(64, 0.3))))
        check_same_bytes(emulator, Setup(q_lens, tuple(rng.integers(0, 5000, 64)), 2, 3, 264), seed)


def test_lengths_beyond_the_capacity_leave_an_empty_plan(emulator: ctypes.CDLL) -> None:
    s = Setup((4, 1), (100, 50))
    planner = s.planner()
    for q_lens in ((2**20, 1), (400, 1), (1, 2**30)):
        plan = planner.plan(s.batch())
        guard = plan.items[len(arrays(plan).items) :].clone()
        plan_as_device(emulator, planner, batch_of(q_lens, (100, 50)), seed=0)
        assert len(arrays(plan).items) == 0 and (plan.worker_indptr == 0).all()
        assert torch.equal(plan.items[-len(guard) :], guard) or not len(guard)
        with pytest.raises(RuntimeError, match=r"max_tokens 5 .* more than .* row tiles"):
            plan.check()


def test_nonsense_on_the_device_counts_as_nothing(emulator: ctypes.CDLL) -> None:
    s = Setup((4, 1, 3), (100, 50, 9))
    planner = s.planner()
    plan = planner.plan(s.batch())
    batch = batch_of((4, -2, 3), (100, 50, -9))  # qo_indptr decreases, a length is negative
    plan_as_device(emulator, planner, batch, seed=0)
    plan.check()
    assert set(arrays(plan).items[:, 0]) == {0, 2}


LISTED = [SKIPS["both"][0], CAUSAL + TREE]


@given(setups(), st.sampled_from(LISTED), st.integers(0, 2**31), st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_same_bytes_of_lists(
    emulator: ctypes.CDLL,
    listers: Callable[[Variant], ctypes.CDLL],
    s: Setup,
    variant: Variant,
    seed: int,
    data: st.DataObject,
) -> None:
    requests = len(s.q_lens)
    if variant is SKIPS["both"][0]:
        _, args = arguments("both", requests, data)
    else:
        words = [data.draw(st.integers(-(2**63), 2**63 - 1)) for _ in range(9 * requests)]
        args = {"tree_mask": torch.tensor(words, dtype=torch.int64), "tree_tokens": 9}
    capacity = {"max_requests": requests + 2, "max_tokens": sum(s.q_lens) + 20}
    host, device = skipping(s, variant, **capacity), skipping(s, variant, **capacity)
    host._buffer.fill_(0xAB), device._buffer.fill_(0xAB)
    host.plan(s.batch(), **args)
    plan_as_device(emulator, device, s.batch(), seed, listers(variant), **args)
    assert torch.equal(host._buffer, device._buffer)


def test_lengths_beyond_the_list_leave_an_empty_plan(
    emulator: ctypes.CDLL, listers: Callable[[Variant], ctypes.CDLL]
) -> None:
    """Neither more keys than the list is wide nor more tokens than it has lines."""
    variant, s = SKIPS["both"][0], Setup((4, 1), (100, 50))
    args = {"stride": 3, "length": 20, "back": torch.zeros(2, dtype=torch.int64)}
    for q_lens, kv_lens in (((4, 1), (100, 105)), ((5, 40), (100, 50)), ((1, 2**30), (9, 9))):
        planner = skipping(s, variant)
        planner.plan(s.batch(), **args)
        planner.list_counts.fill_(7), planner.tile_list.fill_(-7)
        plan_as_device(emulator, planner, batch_of(q_lens, kv_lens), 0, listers(variant), **args)
        assert planner.header[0] == 0 and planner.header[8] == 1
        with pytest.raises(RuntimeError, match="max_kv_len 100, got a batch of more than"):
            Plan(planner, s.batch(), s.batch()).check()
