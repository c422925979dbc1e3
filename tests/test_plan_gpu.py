"""The planner on a GPU: the host planner's bytes, no synchronisation, in graphs, back to back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from plans import arrays, batch_of

from fi_backend.plan import Planner, Tiles

pytestmark = pytest.mark.gpu

REQUESTS, TOKENS, KV_LEN = 256, 4096, 40000
TILES = Tiles(q_wide=64, q_narrow=16, kv=64, workers=264)


def planner_on(device: str, **changes: object) -> Planner:
    arguments = {
        "q_heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "max_requests": REQUESTS,
        "max_tokens": TOKENS,
    }
    return Planner(**(arguments | {"max_kv_len": KV_LEN, "device": device, "tiles": TILES} | changes))


def random_lengths(rng: np.random.Generator, full: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Decodes, prefills, zero lengths, kv_len below q_len. full: every request and token of the capacity."""
    requests = REQUESTS if full else int(rng.integers(0, REQUESTS + 1))
    tokens = TOKENS if full else int(rng.integers(0, TOKENS + 1))
    q_lens = rng.multinomial(tokens, rng.dirichlet(np.full(requests, 0.2))) if requests else []
    if requests and not full and rng.random() < 0.5:
        q_lens = rng.integers(0, 2, requests)
    kv_lens = rng.integers(0, rng.choice([8, 2000, KV_LEN + 1]), requests)
    return tuple(int(q) for q in q_lens), tuple(int(k) for k in kv_lens)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"causal": False},
        {"window": 1000},
        {"batch_invariant": True},
        {"batch_invariant": True, "window": 5000, "kv_heads": 2},
        {"kv_heads": 1, "q_heads": 32},
        {"kv_heads": 32, "tiles": Tiles(64, 16, 64, 132)},
        {"tiles": Tiles(8, 4, 8, 512)},  # more row tiles than shared memory holds
    ],
    ids=str,
)
def test_same_bytes_as_the_host(changes: dict) -> None:
    rng = np.random.default_rng(0)
    host, device = planner_on("cpu", **changes), planner_on("cuda", **changes)
    for i in range(40):
        lengths = random_lengths(rng, full=i % 4 == 0)
        batch = batch_of(*lengths, device="cuda")
        host._buffer.fill_(0xAB), device._buffer.fill_(0xAB)
        host.plan(batch_of(*lengths))
        with no_synchronisation():
            device.plan(batch)
        assert torch.equal(host._buffer, device._buffer.cpu()), lengths


def test_more_requests_than_threads() -> None:
    rng = np.random.default_rng(1)
    lengths = tuple(rng.integers(0, 3, 3000).tolist()), tuple(rng.integers(0, 300, 3000).tolist())
    host, device = (planner_on(d, max_requests=3000, max_tokens=6000) for d in ("cpu", "cuda"))
    host.plan(batch_of(*lengths))
    device.plan(batch_of(*lengths, device="cuda"))
    assert torch.equal(host._buffer, device._buffer.cpu())


def test_host_plans_back_to_back_on_a_busy_stream() -> None:
    """Staging is written again only after its copy: more plans than the ring is deep, on a sleeping GPU."""
    rng = np.random.default_rng(2)
    host, device = planner_on("cpu"), planner_on("cuda")
    lengths = [random_lengths(rng) for _ in range(12)]
    wanted = [arrays(host.plan(batch_of(*n))) for n in lengths]
    batches = [
        (batch_of(*n, "cuda"), host_lengths(*n)) for n in lengths
    ]  # before: these copies wait for the GPU
    device.plan(batches[0][0], on="host", **batches[0][1])  # makes the ring
    found = []
    for batch, on_host in batches:
        torch.cuda._sleep(20_000_000)
        plan = device.plan(batch, on="host", **on_host)
        found.append((plan, device._buffer.clone()))
    for a, (plan, buffer) in zip(wanted, found, strict=True):
        device._buffer.copy_(buffer)
        b = arrays(plan)
        assert np.array_equal(a.items, b.items) and np.array_equal(a.merges, b.merges)
        assert np.array_equal(a.worker_indptr, b.worker_indptr) and (a.slots, a.total) == (b.slots, b.total)


def host_lengths(q_lens: tuple[int, ...], kv_lens: tuple[int, ...]) -> dict[str, torch.Tensor]:
    batch = batch_of(q_lens, kv_lens)
    return {"qo_indptr_cpu": batch.qo_indptr, "kv_len_cpu": batch.kv_len}


def test_a_captured_plan_follows_the_lengths() -> None:
    """Captured with every query length 1, replayed with mixed splits and padded rows."""
    rng = np.random.default_rng(3)
    host, device = planner_on("cpu"), planner_on("cuda")
    batch = batch_of((1,) * REQUESTS, (1,) * REQUESTS, "cuda")
    device.plan(batch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        device.plan(batch)
    for i in range(10):
        q_lens, kv_lens = random_lengths(rng, full=i % 2 == 0)
        padding = (0,) * (REQUESTS - len(q_lens))
        changed = batch_of(q_lens + padding, kv_lens + padding)
        batch.qo_indptr.copy_(changed.qo_indptr)
        batch.kv_len.copy_(changed.kv_len)
        host._buffer.zero_(), device._buffer.zero_()
        host.plan(changed)
        graph.replay()
        assert torch.equal(host._buffer, device._buffer.cpu())


def test_what_is_refused() -> None:
    planner = planner_on("cuda")
    batch = batch_of((1,), (5,), "cuda")
    with pytest.raises(ValueError, match="qo_indptr_cpu and kv_len_cpu"):
        planner.plan(batch, on="host")
    with pytest.raises(ValueError, match="qo_indptr on cuda:0, got cpu"):
        planner.plan(batch_of((1,), (5,)))
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="while a graph is captured"),
        torch.cuda.graph(graph),
    ):
        planner.plan(batch, on="host", **host_lengths((1,), (5,)))


def test_lengths_beyond_the_capacity_are_found_by_check() -> None:
    planner = planner_on("cuda", max_requests=2, max_tokens=16)
    plan = planner.plan(batch_of((100000, 1), (200000, 5), "cuda"))
    with pytest.raises(RuntimeError, match="max_tokens 16 "):
        plan.check()
    assert len(arrays(plan).items) == 0
