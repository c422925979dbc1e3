"""Prefixes of requests: what a tree promises, on the host and by the device's text on host threads."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import emulated
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fi_backend import jit
from fi_backend.formats import BlockSparse
from fi_backend.prefixes import PrefixFinder

SLOW = [HealthCheck.function_scoped_fixture]


def ints(*values: int, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Shared:
    """A batch by its page tables, and a finder for it."""

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    tables: tuple[tuple[int, ...], ...]  # entries of each request, as many as its keys need
    page_size: int = 4
    tile_kv: int = 4
    form: str = "block"
    tokens: int = 3  # that a request may share
    max_depth: int = 7
    always: bool = True

    @property
    def requests(self) -> range:
        return range(len(self.q_lens))

    def finder(self, device: str = "cpu", **changes: Any) -> PrefixFinder:
        requests = max(len(self.q_lens), 1) + 2
        arguments = {
            "q_heads": 8,
            "kv_heads": 2,
            "head_dim": 128,
            "tile_kv": self.tile_kv,
            "max_requests": requests,
            "max_shared_tokens": requests * self.tokens + 1,
            "max_kv_len": max(*self.kv_lens, 1, 1),
            "max_depth": self.max_depth,
            "always": self.always,
            "device": device,
        }
        return PrefixFinder(**(arguments | changes))

    @property
    def qo_indptr(self) -> np.ndarray:
        return np.cumsum((0, *self.q_lens)).astype(np.int32)

    def batch(self, device: str = "cpu") -> BlockSparse:
        lengths = torch.from_numpy(self.qo_indptr).to(device), ints(*self.kv_lens, device=device)
        if self.form == "csr":
            indptr = ints(*np.cumsum((0, *map(len, self.tables))), device=device)
            flat = ints(*itertools.chain(*self.tables), device=device)
            return BlockSparse.from_csr(*lengths, indptr, flat, self.page_size)
        step = self.page_size if self.form == "token" else 1
        table = torch.full((len(self.tables), max(map(len, self.tables), default=0) * step), 7)
        table = table.to(device=device, dtype=torch.int32)
        for row, entries in zip(table, self.tables, strict=True):
            row[: len(entries) * step : step] = ints(*entries, device=device)
        if self.form == "block":
            return BlockSparse.from_block_table(*lengths, table, self.page_size)
        rows = torch.arange(len(self.tables), device=device)
        return BlockSparse.from_token_table(*lengths, table, rows, self.page_size)

    def limit(self, request: int) -> int:
        """Tiles that it may share."""
        q, kv = self.q_lens[request], self.kv_lens[request]
        return max(kv - q, 0) // self.tile_kv if 1 <= q <= self.tokens else 0

    def common(self, a: int, b: int) -> int:
        """Tiles that both begin with."""
        pairs = zip(self.tables[a], self.tables[b], strict=False)
        entries = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return min(entries * self.page_size // self.tile_kv, self.limit(a), self.limit(b))

    def branches(self) -> set[tuple[frozenset[int], int]]:
        """Requests and tiles of every place where requests part."""
        common = {(a, b): self.common(a, b) for a, b in itertools.combinations(self.requests, 2)}
        common |= {(b, a): tiles for (a, b), tiles in common.items()}
        return {
            (frozenset({a, *(r for r in self.requests if r != a and common[a, r] >= tiles)}), tiles)
            for (a, _), tiles in common.items()
            if tiles > 0
        }


@st.composite
def batches(draw: st.DrawFn, **fixed: Any) -> Shared:
    """Each table begins as one before it does, or with nothing known; some requests have nothing to share."""
    page_size = draw(st.sampled_from((1, 2, 3, 4, 8)))
    tables: list[tuple[int, ...]] = []
    q_lens, kv_lens = [], []
    fresh = itertools.count(100)
    for _ in range(draw(st.integers(0, 9))):
        kv_len = draw(st.one_of(st.integers(0, 12), st.integers(20, 60)))
        pages = -(-kv_len // page_size)
        other = draw(st.sampled_from(tables)) if tables else ()
        same = draw(st.one_of(st.just(pages), st.integers(0, pages)))
        table = list(other[:same])
        while len(table) < pages:
            table.append(draw(st.integers(0, 1)) if draw(st.booleans()) else next(fresh))
        tables.append(tuple(table))
        kv_lens.append(kv_len)
        q_lens.append(draw(st.one_of(st.just(1), st.integers(0, 5))))
    drawn = {
        "page_size": page_size,
        "tile_kv": draw(st.sampled_from((1, 2, 4, 5))),
        "form": draw(st.sampled_from(("block", "token", "csr"))),
        "max_depth": draw(st.integers(1, 7)),
    }
    return Shared(tuple(q_lens), tuple(kv_lens), tuple(tables), **(drawn | fixed))


class Found(NamedTuple):
    first: int
    tokens: int
    kv_begin: int
    kv_end: int
    request: int
    requests: int
    parent: int
    depth: int


class Tree(NamedTuple):
    prefixes: list[Found]
    prefix_of: list[int]
    places: list[list[int]]
    saved: int

    def members(self, prefix: Found) -> frozenset[int]:
        return frozenset(r for _, r in self.places[prefix.first : prefix.first + prefix.tokens])


def tree_of(finder: PrefixFinder, requests: int) -> Tree:
    header = finder.header.cpu()
    prefixes, tokens = header[:2].tolist()
    return Tree(
        [Found(*x) for x in finder.prefixes[:prefixes].tolist()],
        finder.prefix_of[:requests].tolist(),
        finder.places[:tokens].tolist(),
        int(header[2:].view(torch.int64)),
    )


def check_tree(s: Shared, tree: Tree) -> None:
    """What csrc/params.h says of a tree, and that all of a prefix's requests begin with its keys."""
    held: dict[int, list[int]] = {r: [] for r in s.requests}
    for i, x in enumerate(tree.prefixes):
        members = tree.members(x)
        assert 0 <= x.first <= x.first + x.tokens <= len(tree.places)
        assert x.tokens == sum(s.q_lens[r] for r in members) and x.requests == len(members) >= 2
        assert x.request in members and x.kv_begin < x.kv_end
        assert x.kv_begin % s.tile_kv == x.kv_end % s.tile_kv == 0
        for r in members:
            held[r].append(i)
            assert x.kv_end // s.tile_kv <= s.limit(r)
            assert r == x.request or s.common(r, x.request) * s.tile_kv >= x.kv_end
        if x.parent < 0:
            assert (x.kv_begin, x.depth) == (0, 0)
            continue
        above = tree.prefixes[x.parent]
        assert x.parent < i and (x.kv_begin, x.depth) == (above.kv_end, above.depth + 1)
        assert members < tree.members(above) and x.depth < s.max_depth
    for r, of in enumerate(held.values()):
        assert tree.prefix_of[r] == (of[-1] if of else -1)
        if of:  # they are one behind the other
            assert [tree.prefixes[i].parent for i in of] == [-1, *of[:-1]]
    tokens = {(int(s.qo_indptr[r]) + i, r) for r, of in held.items() if of for i in range(s.q_lens[r])}
    assert len(tokens) == len(tree.places) and tokens == {(t, r) for t, r in tree.places}
    assert tree.saved == sum((x.requests - 1) * (x.kv_end - x.kv_begin) for x in tree.prefixes)


def found(s: Shared, **changes: Any) -> Tree:
    finder = s.finder(**changes)
    finder._buffer.fill_(0xAB)
    finder.find(s.batch())
    return tree_of(finder, len(s.q_lens))


@given(batches())
@settings(max_examples=150, deadline=None)
def test_promises(s: Shared) -> None:
    check_tree(s, found(s))


@given(batches(max_depth=7))
@settings(max_examples=150, deadline=None)
def test_always_finds_every_branch(s: Shared) -> None:
    tree, branches = found(s), s.branches()
    if len(s.q_lens) <= 8:  # or they may be nested deeper
        assert {(tree.members(x), x.kv_end // s.tile_kv) for x in tree.prefixes} == branches


@given(batches())
@settings(max_examples=100, deadline=None)
def test_a_limited_depth_saves_most(s: Shared) -> None:
    """At least as much as the outermost branches save, and no less with another level."""
    saved = [found(s, max_depth=depth).saved for depth in (s.max_depth, min(s.max_depth + 1, 7))]
    nested = sorted(s.branches(), key=lambda x: x[1])
    outermost, depths, ends = 0, {}, {}
    for members, tiles in nested:
        above = max((x for x in depths if members < x), key=lambda x: ends[x], default=None)
        depths[members], ends[members] = (depths[above] + 1 if above else 0), tiles
        if depths[members] < s.max_depth:
            outermost += (len(members) - 1) * (tiles - (ends[above] if above else 0)) * s.tile_kv
    assert outermost <= saved[0] <= saved[1]


def family(
    groups: list[list[int]], keys: list[int], page_size: int = 16, tile_kv: int = 128, **changes: Any
) -> Shared:
    """Requests of one token in nested groups. groups: sizes on a level; keys: that it adds to the shared."""
    requests = sum(groups[0])
    tables: list[list[int]] = [[] for _ in range(requests)]
    fresh = itertools.count(1)
    for sizes, more in zip(groups, keys, strict=True):
        begin = 0
        for size in sizes:
            pages = [next(fresh) for _ in range(more // page_size)]
            for r in range(begin, begin + size):
                tables[r] += pages
            begin += size
    for table in tables:
        table.append(next(fresh))
    lens = tuple((len(table) - 1) * page_size + 1 for table in tables)
    rows = tuple(tuple(table) for table in tables)
    return Shared((1,) * requests, lens, rows, page_size, tile_kv, tokens=1, **changes)


def by_cost(s: Shared) -> list[tuple[int, int, int]]:
    """Requests and keys of the prefixes that pay."""
    tree = found(s, always=False)
    check_tree(s, tree)
    return sorted((x.requests, x.kv_begin, x.kv_end) for x in tree.prefixes)


def test_prefixes_that_pay() -> None:
    assert by_cost(family([[64]], [8192])) == [(64, 0, 8192)]
    assert by_cost(family([[2]], [128])) == []
    assert by_cost(family([[64]], [128])) == [], "all of it saves less than 4 us"
    groups = [[128], [64, 64]]
    assert by_cost(family(groups, [4096, 2048])) == [(64, 4096, 6144)] * 2 + [(128, 0, 4096)]
    assert by_cost(family(groups, [1024, 5120])) == [(64, 0, 6144)] * 2, "joined once more to save so little"
    assert by_cost(family(groups, [128, 4096])) == [(64, 0, 4224)] * 2, "joined for 128 rows to save a tile"
    assert by_cost(family(groups, [4096, 0])) == [(128, 0, 4096)]
    pairs = [[128], [2] * 64]
    assert by_cost(family(pairs, [4096, 128])) == [(128, 0, 4096)], "an item each to save a tile"
    assert len(by_cost(family(pairs, [4096, 4096]))) == 65
    assert by_cost(family(pairs, [128, 8192], max_depth=1)) == [(2, 0, 8320)] * 64, "the most at one level"
    assert by_cost(family([[128], [16] * 8, [2] * 64], [4096, 128, 128], max_depth=1)) == [(128, 0, 4096)]


def test_own_keys_are_not_shared() -> None:
    table = (1, 2, 3, 4)
    ends = {q: found(Shared((q, q), (16, 16), (table, table))).prefixes for q in (0, 1, 3, 4)}
    assert [[x.kv_end for x in ends[q]] for q in ends] == [[], [12], [12], []]
    lens = Shared((1, 1), (16, 9), (table, table[:3]))
    assert [x.kv_end for x in found(lens).prefixes] == [8]


@pytest.mark.parametrize(
    ("page_size", "tile_kv", "entry", "shared"),
    [
        (1, 8, 17, 16),
        (8, 8, 2, 16),
        (5, 8, 3, 8),
        (5, 8, 4, 16),
        (12, 4, 1, 12),
        (12, 4, 0, 0),
        (64, 4, 1, 32),
    ],
)
def test_one_entry_apart(page_size: int, tile_kv: int, entry: int, shared: int) -> None:
    """Pages that tiles cut and tiles that pages cut; no more than 32 keys are shared at all."""
    table = list(range(max(-(-33 // page_size), entry + 1)))
    other = table.copy()
    other[entry] += 100
    s = Shared((1, 1), (33, 35), (tuple(table), tuple(other)), page_size, tile_kv)
    assert [x.kv_end for x in found(s).prefixes] == [shared] * (shared > 0)


# The device's text


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated.library("prefix.cpp", tmp_path_factory.mktemp("emulate"), jit.csrc())


def find_as_device(
    emulator: ctypes.CDLL,
    finder: PrefixFinder,
    batch: BlockSparse,
    seed: int = 0,
    on: str = "fi_find_prefixes",
) -> None:
    emulator.set_seed(seed)
    functions = emulated.address(getattr(emulator, on)), emulated.address(emulator.fi_error)
    jit.core().find_prefixes(finder._config, finder._buffer, *inputs(batch), *functions)


def inputs(b: BlockSparse) -> tuple[Any, ...]:
    return b.qo_indptr, b.kv_len, b.table, b.starts, b.start_stride, b.entry_step, b.page_size


def found_as_device(
    emulator: ctypes.CDLL, s: Shared, seed: int, on: str = "fi_find_prefixes", **changes: Any
) -> Tree:
    finder = s.finder(**changes)
    for _ in range(2):  # it leaves the buffers ready for the next
        find_as_device(emulator, finder, s.batch(), seed, on)
    return tree_of(finder, len(s.q_lens))


@given(batches(), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
def test_same_tree(emulator: ctypes.CDLL, s: Shared, always: bool, seed: int) -> None:
    assert found_as_device(emulator, s, seed, always=always) == found(s, always=always)


def test_same_tree_of_large_batches(emulator: ctypes.CDLL) -> None:
    """More requests than threads, more entries than a turn takes, every level in use."""
    rng = np.random.default_rng(0)
    levels = [[150], [90, 60], [45, 45, 30, 30], [15] * 10, [5] * 30, [3, 2] * 30]
    large = family(levels, [256, 128, 384, 128, 256, 128], page_size=1)
    shuffled = rng.permutation(len(large.tables))
    large = Shared(large.q_lens, large.kv_lens, tuple(large.tables[i] for i in shuffled), 1, 128, tokens=1)
    for max_depth, always in ((7, True), (2, True), (3, False)):
        tree = found(large, max_depth=max_depth, always=always)
        assert len(tree.prefixes) > 2
        assert found_as_device(emulator, large, 5, max_depth=max_depth, always=always) == tree


def test_what_follows_a_difference_does_not_count(emulator: ctypes.CDLL) -> None:
    """The last request is attached to the second, though it has more entries in common with the first."""
    own = list(range(700))
    first, second = own.copy(), own.copy()
    first[100], second[200] = 1000, 1000
    s = Shared((1,) * 3, (700,) * 3, (tuple(first), tuple(second), tuple(own)), 1, 64)
    assert [x.kv_end for x in found_as_device(emulator, s, 0).prefixes] == [64, 192]


def guarded(values: list[int]) -> torch.Tensor:
    """int32 that end where the process may not read."""
    libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
    pages = -(-len(values) * 4 // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    array = np.frombuffer(memory, np.int32, pages * page // 4)[pages * page // 4 - len(values) :]
    array[:] = values
    guard = ctypes.c_void_p(array.ctypes.data + 4 * len(values))
    assert libc.mprotect(guard, page, 0) == 0
    return torch.from_numpy(array)


@pytest.mark.parametrize("on", ["host", "device"])
def test_nothing_is_read_behind_the_keys(emulator: ctypes.CDLL, on: str) -> None:
    """Tables end with the keys of max_kv_len, lengths go beyond; and below nothing."""
    table = guarded([1, 2, 3, 4, 1, 2, 3, 5]).view(2, 4)
    for qo_indptr, kv_lens, wanted in (
        ((0, 1, 2), (16, 16), [12]),
        ((0, 1, 2), (2**31 - 1, 2**30), [12]),
        ((0, 1, 2), (16, -5), []),
        ((0, 1, -(2**31)), (16, 16), []),
        ((0, 2**31 - 1, 0), (16, 16), []),
        ((-(2**31), 2**31 - 1, 2**31 - 1), (16, 16), []),
    ):
        finder = Shared((1, 1), (16, 16), ((), ())).finder()
        batch = BlockSparse.from_block_table(guarded(list(qo_indptr)), guarded(list(kv_lens)), table, 4)
        finder.find(batch) if on == "host" else find_as_device(emulator, finder, batch)
        assert [x.kv_end for x in tree_of(finder, 2).prefixes] == wanted


COMPARISONS = [
    ("if (a[i] != b[i]) rest", "if (false) rest"),
    ("a[same] == b[same]) ++same", "true) ++same"),
]
HASHES = {
    "of few bits": ("return int64_t(x ^ x >> 32) & kHashMask;", "return int64_t(x ^ x >> 32) & 1;"),
    "of places alone": ("| uint32_t(entry);", "| (uint32_t(entry) & 0);"),
}
FINDERS = ("fi_find_prefixes", "fi_find_on_host")


def broken(folder: Path, *changes: tuple[str, str]) -> ctypes.CDLL:
    shutil.copytree(jit.csrc(), folder / "csrc")
    files = [folder / "csrc" / path for path in ("prefix.h", "smxx/prefix.cuh", "core/prefix.cpp")]
    for text, other in changes:
        assert sum(file.read_text().count(text) for file in files) == 1
        for file in files:
            file.write_text(file.read_text().replace(text, other))
    return emulated.library("prefix.cpp", folder, folder / "csrc")


@pytest.mark.parametrize("name", HASHES)
def test_right_whatever_the_hashes(name: str, tmp_path: Path) -> None:
    bad = broken(tmp_path, HASHES[name])

    @given(batches(), st.integers(0, 2**31))
    @settings(max_examples=40, deadline=None)
    def check(s: Shared, seed: int) -> None:
        on_device, on_host = (found_as_device(bad, s, seed, on) for on in FINDERS)
        check_tree(s, on_device)
        assert on_host == on_device

    check()


def test_the_checks_notice_what_is_not_compared(tmp_path: Path) -> None:
    bad = broken(tmp_path, HASHES["of places alone"], *COMPARISONS)
    s = Shared((1, 1), (17, 17), ((1, 2, 3, 4, 5), (1, 2, 9, 4, 5)))
    for on in FINDERS:
        with pytest.raises(AssertionError):
            check_tree(s, found_as_device(bad, s, 0, on))


# Trees that the user gives


def given_tree(s: Shared, prefixes: list[tuple[list[int], int]], **changes: Any) -> Tree:
    finder = s.finder(**changes)
    finder.set(prefixes, torch.from_numpy(s.qo_indptr), ints(*s.kv_lens))
    return tree_of(finder, len(s.q_lens))


@given(batches(max_depth=7), st.randoms())
@settings(max_examples=100, deadline=None)
def test_what_is_found_can_be_given(s: Shared, random: Any) -> None:
    tree = found(s)
    prefixes = [(sorted(tree.members(x), key=lambda _: random.random()), x.kv_end) for x in tree.prefixes]
    random.shuffle(prefixes)
    again = given_tree(s, prefixes)
    check_tree(s, again)
    assert again.saved == tree.saved
    assert {(again.members(x), x.kv_end) for x in again.prefixes} == {
        (tree.members(x), x.kv_end) for x in tree.prefixes
    }


FOUR = Shared((1, 2, 1, 0), (20, 22, 30, 20), ((),) * 4)


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        (
            [([0, 1], 8), ([1, 2], 12)],
            r"nest, got 12 keys for requests \[1, 2\] and 8 keys for requests \[0, 1\]",
        ),
        ([([0, 1], 8), ([0, 1, 2], 12)], r"nest, got 12 keys for requests \[0, 1, 2\] and"),
        ([([0, 1], 8), ([0, 1], 8)], "nest, got 8 keys"),
        ([([0, 4], 8)], r"requests from 0 to 3, got a prefix of 8 keys for requests \[0, 4\]"),
        ([([-1, 0], 8)], "requests from 0 to 3"),
        ([([], 8)], "requests from 0 to 3"),
        ([([0, 0], 8)], "each request once"),
        ([([0, 1], 10)], r"multiple of 4 keys \(tile_kv\), got a prefix of 10"),
        ([([0, 1], 0)], "multiple of 4 keys"),
        ([([0, 1], 20)], r"of which 0 has 20 keys and 1 query tokens"),
        ([([0, 3], 8)], "of which 3 has 20 keys and 0 query tokens"),
        (
            [([0, 1, 2], 4), ([0, 1], 8), ([0], 12)],
            r"at most 2 prefixes above one another \(max_depth\), got one more: 12",
        ),
        ([([0, 1], 4 * i + 4) for i in range(7)], r"at most 6 prefixes \(max_requests\), got 7"),
    ],
)
def test_trees_that_are_none(prefixes: list[tuple[list[int], int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        given_tree(FOUR, prefixes, max_depth=2)


def test_a_refused_tree_leaves_the_last_one() -> None:
    finder = FOUR.finder(max_shared_tokens=6)
    lengths = torch.from_numpy(FOUR.qo_indptr), ints(*FOUR.kv_lens)
    finder.set([([2, 0], 16), ([0, 1, 2], 8)], *lengths)
    before = finder._buffer.clone()
    tree = tree_of(finder, 4)
    assert tree.prefixes == [Found(0, 4, 0, 8, 0, 3, -1, 0), Found(0, 2, 8, 16, 0, 2, 0, 1)]
    assert tree.places == [[0, 0], [3, 2], [1, 1], [2, 1]] and tree.prefix_of == [1, 0, 1, -1]
    with pytest.raises(ValueError, match=r"at most 6 requests|nest"):
        finder.set([([0, 1], 8), ([1, 2], 8)], *lengths)
    tokens = torch.tensor([0, 1, 3, 9, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"at most 6 query tokens in prefixes \(max_shared_tokens\), got 9"):
        finder.set([([0, 1, 2], 8)], tokens, lengths[1])
    with pytest.raises(TypeError, match="kv_len of dtype int32, got int64"):
        finder.set([([0, 1], 8)], lengths[0], lengths[1].long())
    assert torch.equal(finder._buffer, before)
    finder.set([], *lengths)
    assert tree_of(finder, 4) == Tree([], [-1] * 4, [], 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_depth": 8}, "max_depth from 1 to 7, got 8"),
        ({"max_shared_tokens": 5}, r"max_shared_tokens from 6 \(max_requests\) to \d+, got 5"),
        ({"tile_kv": 0}, "tile_kv from 1"),
        ({"max_kv_len": 0}, "max_kv_len from 1"),
        ({"q_heads": 7}, "q_heads a multiple of kv_heads, got 7 and 2"),
    ],
)
def test_finders_that_make_no_sense(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FOUR.finder(**changes)


def test_capacities() -> None:
    with pytest.raises(ValueError, match="max_requests from 1 to 1024, got 1025"):
        FOUR.finder(max_requests=1025, max_shared_tokens=2000)
    with pytest.raises(ValueError, match=r"at most 6 requests \(max_requests\), got 7"):
        FOUR.finder().find(Shared((1,) * 7, (4,) * 7, ((1,),) * 7).batch())
