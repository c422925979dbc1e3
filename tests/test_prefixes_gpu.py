"""The prefix finder on a GPU: the host's trees, no synchronisation, in graphs, back to back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_plan_gpu import no_synchronisation
from test_prefixes import Shared, Tree, check_tree, family, tree_of

from fi_backend.formats import BlockSparse
from fi_backend.prefixes import PrefixFinder

pytestmark = pytest.mark.gpu

KV_LEN = 8192


def forest(rng: np.random.Generator, requests: int, page_size: int, tile_kv: int = 128) -> Shared:
    """Tables that begin as one before; zero lengths, lengths below q_len, requests that may not share."""
    tables: list[tuple[int, ...]] = []
    q_lens, kv_lens = [], []
    for r in range(requests):
        kv_len = int(rng.integers(0, rng.choice([9, 2000, KV_LEN + 1])))
        pages = -(-kv_len // page_size)
        other = tables[rng.integers(0, r)] if r and rng.random() < 0.9 else ()
        same = int(rng.choice([rng.integers(0, pages + 1), pages]))
        tables.append((*other[:same], *(r * KV_LEN + np.arange(pages - len(other[:same]))).tolist()))
        kv_lens.append(kv_len)
        q_lens.append(int(rng.choice([0, 1, 1, 1, 1, 3, 9])))
    form = str(rng.choice(["block", "token", "csr"]))
    return Shared(tuple(q_lens), tuple(kv_lens), tuple(tables), page_size, tile_kv, form)


def found(s: Shared, finder: PrefixFinder) -> Tree:
    batch = s.batch(finder.device.type)
    if finder.device.type == "cuda":
        with no_synchronisation():
            finder.find(batch)
    else:
        finder.find(batch)
    return tree_of(finder, len(s.q_lens))


def finders(s: Shared, **changes: object) -> tuple[PrefixFinder, PrefixFinder]:
    host, device = (s.finder(d, **({"max_kv_len": KV_LEN} | changes)) for d in ("cpu", "cuda"))
    return host, device


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize(
    ("requests", "page_size"), [(0, 16), (1, 16), (2, 16), (60, 1), (200, 16), (300, 256)]
)
def test_same_tree_as_the_host(requests: int, page_size: int, always: bool) -> None:
    rng = np.random.default_rng(requests)
    for i in range(6):
        s = forest(rng, requests, page_size, tile_kv=int(rng.choice([64, 96, 128, 160])))
        host, device = finders(s, always=always, max_depth=1 + i)
        wanted = found(s, host)
        for _ in range(3):
            device.prefix_of.fill_(7)
            assert found(s, device) == wanted
        check_tree(s, wanted)


def test_as_many_requests_as_it_takes() -> None:
    rng = np.random.default_rng(1)
    for s in (forest(rng, 1024, 16), family([[1024], [256] * 4, [2] * 512], [1024, 512, 256])):
        host, device = finders(s, max_requests=1024, max_shared_tokens=4000)
        wanted = found(s, host)
        assert len(wanted.prefixes) > 100 and found(s, device) == wanted


def test_prefixes_that_pay() -> None:
    s = family([[256], [16] * 16], [4096, 2048])
    host, device = finders(s, always=False)
    assert found(s, device) == found(s, host)
    assert [x.requests for x in tree_of(device, 256).prefixes] == [256] + [16] * 16


def test_a_captured_finder_follows_the_tables() -> None:
    """Captured on tables that share nothing, replayed on others in the same memory."""
    rng = np.random.default_rng(2)
    requests, pages = 200, KV_LEN // 16
    batch = BlockSparse.from_block_table(
        torch.arange(requests + 1, dtype=torch.int32, device="cuda"),
        torch.zeros(requests, dtype=torch.int32, device="cuda"),
        torch.zeros(requests, pages, dtype=torch.int32, device="cuda"),
        page_size=16,
    )
    empty = Shared((1,) * requests, (0,) * requests, ((),) * requests, 16, 128, max_depth=3)
    host, device = finders(empty)
    device.find(batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        device.find(batch)
    for i in range(5):
        s = forest(rng, requests, 16) if i % 2 == 0 else empty
        batch.qo_indptr.copy_(torch.from_numpy(s.qo_indptr))
        batch.kv_len.copy_(torch.tensor(s.kv_lens, dtype=torch.int32))
        for row, entries in zip(batch.table, s.tables, strict=True):
            row[: len(entries)] = torch.tensor(entries, dtype=torch.int32)
        graph.replay()
        assert tree_of(device, requests) == found(s, host)


def test_nonsense_on_the_device_counts_as_nothing() -> None:
    s = family([[4]], [256])
    _, device = finders(s, max_kv_len=300)
    for lengths in ((2**31 - 1, 2**30, -1, -(2**31)), (-1,) * 4):
        batch = s.batch("cuda")
        batch.kv_len.copy_(torch.tensor(lengths, dtype=torch.int32))
        device.find(batch)
        assert [x.requests for x in tree_of(device, 4).prefixes] == [2] * (max(lengths) > 0)
    batch.qo_indptr.copy_(torch.tensor([0, 2**31 - 1, -(2**31), 5, 4], dtype=torch.int32))
    device.find(batch)
    assert tree_of(device, 4).prefixes == []


def test_trees_that_the_user_gives_back_to_back_on_a_busy_stream() -> None:
    """What is copied is not written again before: on a sleeping GPU."""
    s = family([[64]], [1024])
    host, device = finders(s)
    lengths = torch.from_numpy(s.qo_indptr), torch.tensor(s.kv_lens, dtype=torch.int32)
    trees = [[(list(range(i, 64)), 512), (list(range(32, 64)), 1024)] for i in range(12)]
    found_on_device = []
    for tree in trees:
        torch.cuda._sleep(20_000_000)
        device.set(tree, *lengths)
        found_on_device.append(device._buffer.clone())
    for tree, buffer in zip(trees, found_on_device, strict=True):
        device._buffer.copy_(buffer)
        host.set(tree, *lengths)
        assert tree_of(device, 64) == tree_of(host, 64)
