"""Buckets: the tightest is taken, padding is harmless, and a graph plans for the lengths of its replay."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fi_backend import BlockSparse, Buckets, KVCache, Planner, append, eager, run
from fi_backend.compare import ATOL
from fi_backend.variants import CAUSAL

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
ROWS, PAGES, PAGE, Q_HEADS, KV_HEADS, DIM = 8, 40, 16, 4, 2, 64
SIZES = (4, 1, 8, 2)
PADDING = (0, 0, 0, 0, -1)
BF16 = torch.bfloat16


def doubled(seen: list[int], sizes: tuple[int, ...] = SIZES) -> tuple[torch.Tensor, Buckets]:
    """A step that writes down how many rows it gets, and a batch of ones."""
    x = torch.ones(ROWS, 3)

    def step(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return 2 * x

    return x, Buckets(step, (x,), (-1,), sizes)


def test_the_tightest_bucket() -> None:
    seen: list[int] = []
    x, buckets = doubled(seen)
    buckets.capture()
    assert seen == [8, 4, 2, 1], "expected a first run of each bucket, the largest first"
    for n in range(1, ROWS + 1):
        seen.clear()
        x.fill_(5)
        assert torch.equal(buckets(n), torch.full((n, 3), 10.0))
        (size,) = seen
        assert size == buckets.size_for(n) == next(s for s in (1, 2, 4, 8) if s >= n)
        assert (x[:n] == 5).all() and (x[n:size] == -1).all() and (x[size:] == 5).all()


def test_a_tuple_of_outputs() -> None:
    x = torch.zeros(4, dtype=torch.int64)
    buckets = Buckets(lambda x: (x + 1, x[:, None] * 2), (x,), (0,), (4,))
    buckets.capture()
    x[:3] = torch.tensor([1, 2, 3])
    more, twice = buckets(3)
    assert more.tolist() == [2, 3, 4] and twice.tolist() == [[2], [4], [6]]


@pytest.mark.parametrize("n", [0, -1, 9])
def test_rows_that_no_bucket_has(n: int) -> None:
    _, buckets = doubled([])
    buckets.capture()
    with pytest.raises(ValueError, match=rf"expected 1 to 8 rows \(the largest bucket\), got {n}"):
        buckets(n)


def test_not_captured() -> None:
    _, buckets = doubled([])
    with pytest.raises(RuntimeError, match=r"expected capture\(\) before the first call"):
        buckets(1)


@pytest.mark.parametrize(
    ("inputs", "padding", "sizes", "message"),
    [
        ([torch.zeros(4)], [0], [], r"bucket sizes of at least 1, got \[\]"),
        ([torch.zeros(4)], [0], [2, 0], r"bucket sizes of at least 1, got \[2, 0\]"),
        ([torch.zeros(4)], [0, 0], [2], "got 1 inputs and 2 numbers"),
        ([], [], [2], "got 0 inputs and 0 numbers"),
        ([torch.zeros(4), torch.zeros(3)], [0, 0], [4], r"input 1 of at least 4 rows .*, got shape \[3\]"),
        ([torch.zeros(())], [0], [1], r"input 0 of at least 1 rows .*, got shape \[\]"),
        ([torch.zeros(4), torch.zeros(4, device="meta")], [0, 0], [4], "input 1 on cpu, got meta"),
    ],
)
def test_refuses(inputs: list[torch.Tensor], padding: list[int], sizes: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Buckets(lambda *x: x[0], inputs, padding, sizes)


def test_outputs_of_other_rows() -> None:
    buckets = Buckets(lambda x: x.sum(), (torch.zeros(4),), (0,), (4,))
    with pytest.raises(ValueError, match=r"expected step to return 4 rows, got shape \[\]"):
        buckets.capture()


@dataclass
class Decode:
    """One decode layer over a random cache: every request has pages of its own, in random order."""

    device: str
    padded_slot: int = -1

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(self.device, BF16)

        self.kv = KVCache(*(normal(PAGES, PAGE, KV_HEADS, DIM) for _ in "kv"))
        table = torch.randperm(PAGES, generator=generator).view(ROWS, PAGES // ROWS).int()
        self.new = {name: normal(ROWS, heads, DIM) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
        self.q, self.k, self.v = (torch.zeros_like(x) for x in self.new.values())
        self.table = table.to(self.device)
        self.kv_len = torch.zeros(ROWS, dtype=torch.int32, device=self.device)
        self.slots = torch.zeros(ROWS, dtype=torch.int64, device=self.device)
        self.one_each = torch.arange(ROWS + 1, dtype=torch.int32, device=self.device)
        self.planner = Planner(
            q_heads=Q_HEADS,
            kv_heads=KV_HEADS,
            head_dim=DIM,
            max_requests=ROWS,
            max_tokens=ROWS,
            device=self.device,
        )
        self.inputs = (self.q, self.k, self.v, self.kv_len, self.slots)
        self.buckets = Buckets(self.step, self.inputs, (*PADDING[:-1], self.padded_slot), SIZES)
        before = self.kv.k.clone()
        self.buckets.capture()
        self.written_by_capture = not torch.equal(before, self.kv.k)

    def batch(self, kv_len: torch.Tensor) -> BlockSparse:
        n = len(kv_len)
        return BlockSparse.from_block_table(self.one_each[: n + 1], kv_len, self.table[:n], PAGE)

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *lengths: torch.Tensor) -> torch.Tensor:
        kv_len, slots = lengths
        append(self.kv, k, v, slots)
        return run(self.planner.plan(self.batch(kv_len)), q, self.kv)

    def check(self, lengths: tuple[int, ...]) -> None:
        """Appends a token to each request, and compares with the oracle; nothing else may be written."""
        n = len(lengths)
        kv_len = torch.tensor(lengths, dtype=torch.int32, device=self.device)
        last = kv_len.long() - 1
        slots = self.table[torch.arange(n, device=self.device), last // PAGE] * PAGE + last % PAGE
        wanted = [x.clone() for x in (self.kv.k, self.kv.v)]
        for cache, new in zip(wanted, (self.new["k"], self.new["v"]), strict=True):
            cache.view(-1, KV_HEADS, DIM)[slots] = new[:n]
        for static, new in zip((self.q, self.k, self.v), self.new.values(), strict=True):
            static.copy_(new)  # what a larger batch left behind
        self.kv_len.fill_(PAGE), self.slots.fill_(0)
        self.kv_len[:n], self.slots[:n] = kv_len, slots

        out = self.buckets(n)

        assert torch.equal(self.kv.k, wanted[0]) and torch.equal(self.kv.v, wanted[1]), "appended elsewhere"
        ask = (self.new["q"][:n], KVCache(*wanted), self.batch(kv_len), CAUSAL, {}, DIM**-0.5)
        (true, _), (fair, _) = eager.attention(*ask), eager.attention(*ask, dtype=BF16)
        limit = 2 * (fair.to(BF16) - true).abs().max() + ATOL[BF16]
        off = (out - true).abs().max()
        assert off <= limit, f"off by {off:.3e}, at most {limit:.3e} allowed"


BATCHES = [(80,) * 8, (1, 17, 80), (33,), (5, 64, 16, 79, 1), (80, 2), (3, 3, 3, 70, 20, 10, 48)]


@DEVICES
def test_a_plan_in_every_bucket(device: str) -> None:
    """Lengths, rows and buckets change from call to call."""
    decode = Decode(device)
    assert not decode.written_by_capture
    for lengths in BATCHES + BATCHES[::-1]:
        decode.check(lengths)


@DEVICES
def test_padding_matters(device: str) -> None:
    """Negative control: with another slot than -1, padded rows write into the cache."""
    decode = Decode(device, padded_slot=7)
    assert decode.written_by_capture
    decode.kv.k.normal_()
    decode.check((80,) * 8)  # no padded rows
    with pytest.raises(AssertionError, match="appended elsewhere"):
        decode.check((1, 17, 80))


def test_a_plan_outside_of_the_step() -> None:
    """Negative control: replays attend for the lengths of that plan. A GPU's KV tile has room for all."""
    decode = Decode("cpu")
    decode.kv_len.fill_(1)
    plan = decode.planner.plan(decode.batch(decode.kv_len))

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *lengths: torch.Tensor) -> torch.Tensor:
        append(decode.kv, k, v, lengths[1])
        return run(plan, q, decode.kv)

    decode.buckets = Buckets(step, decode.inputs, PADDING, (ROWS,))
    decode.buckets.capture()
    decode.check((1,) * 8)
    with pytest.raises(AssertionError, match="off by"):
        decode.check((80,) * 8)


@pytest.mark.gpu
def test_a_replay_does_not_wait() -> None:
    decode = Decode("cuda")
    decode.check((80,) * 8)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode.buckets(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
