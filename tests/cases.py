"""A case is a value: lengths, heads, layout, variant, seed. `make` turns it into tensors for any executor.

Whatever must not be read is NaN: pages of nobody, the tail of a last page, entries past a request's pages.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

import torch

from fi_backend.formats import BlockSparse, KVCache
from fi_backend.rope import rope_turns
from fi_backend.variants import DOCUMENT, PACKED_MASK, PREFIX_LM, TREE, Variant, parse

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
LAYOUTS = ("NHD", "HND", "packed", "padded")
TABLES = ("block", "token", "token64", "csr", "csr64")
POISON = float("nan")


@dataclass(frozen=True)
class Case:
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    head_dim_vo: int | None = None  # None: head_dim
    page_size: int = 16
    run: int = 1  # so many pages lie one behind the other
    # (first, requests, keys): these requests, neighbours, have the first one's pages as far as its keys go
    prefixes: tuple[tuple[int, int, int], ...] = ()
    layout: str = "NHD"
    table: str = "block"
    dtype: str = "bf16"
    variant: str = "CAUSAL"
    window: int = 50
    soft_cap: float = 3.0
    tree_tokens: int | None = None  # None: those of the longest request
    tree: str = "random"  # or "chain", or "blind": every other token sees no token of the tree
    extra_tokens: int = 2  # rows of q past the last request
    seed: int = 0

    def __str__(self) -> str:
        dims = f"{self.head_dim}x{self.head_dim_vo or self.head_dim}"
        lens = f"{len(self.q_lens)}r{sum(self.q_lens)}q{sum(self.kv_lens)}k"
        heads = f"{self.q_heads}h{self.kv_heads}"
        pages = f"p{self.page_size}" + (f"x{self.run}" if self.run > 1 else "")
        shared = f"-{len(self.prefixes)}prefixes" if self.prefixes else ""
        return f"{lens}-{heads}-{dims}-{self.dtype}-{pages}{shared}-{self.layout}-{self.table}-{self.variant}"


@dataclass
class Inputs:
    case: Case
    q: torch.Tensor
    kv: KVCache
    batch: BlockSparse
    out: torch.Tensor  # poisoned
    lse: torch.Tensor  # poisoned
    variant: Variant
    variant_args: dict[str, Any]

    @property
    def tokens(self) -> int:
        return sum(self.case.q_lens)


def _empty_cache(case: Case, pages: int, dtype: torch.dtype, device: torch.device) -> KVCache:
    dims = (case.head_dim, case.head_dim_vo or case.head_dim)
    n, h = case.page_size, case.kv_heads

    def full(*shape: int) -> torch.Tensor:
        return torch.full(shape, POISON, dtype=dtype, device=device)

    if case.layout == "packed":
        if dims[0] != dims[1]:
            raise ValueError("a packed cache has one head_dim")
        return KVCache.packed(full(pages, h, n, 2 * dims[0]))
    if case.layout == "HND":
        return KVCache.separate(*(full(pages, h, n, d) for d in dims), layout="HND")
    if case.layout == "padded":  # page, token and head strides all larger than they need to be
        return KVCache.separate(*(full(pages, n + 1, h + 1, d + 16)[:, :n, :h, :d] for d in dims))
    return KVCache.separate(*(full(pages, n, h, d) for d in dims))


def _tables(case: Case, owned: list[list[int]], device: torch.device) -> dict[str, Any]:
    """Page ids of each request, in the form the case asks for. Page 0 belongs to nobody."""
    width = max(map(len, owned), default=0) + 2
    block = torch.zeros(len(owned), width, dtype=torch.int32)
    for row, pages in enumerate(owned):
        block[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
    if case.table == "block":
        wide = torch.zeros(
            len(owned) + 1, width + 3, dtype=torch.int32
        )  # rows lie further apart than they are long
        wide[: len(owned), :width] = block
        return {"block_table": wide.to(device)[:, :width]}
    if case.table.startswith("token"):
        slots = block[:, :, None] * case.page_size + torch.arange(case.page_size, dtype=torch.int32)
        pool = torch.zeros(2 * len(owned) + 1, width * case.page_size, dtype=torch.int32)
        rows = torch.arange(2 * len(owned) - 1, -1, -2, dtype=torch.int64)
        pool[rows] = slots.flatten(1)
        return {
            "req_to_token": pool.to(device),
            "rows": rows.to(device, torch.int64 if case.table == "token64" else torch.int32),
        }
    indptr = torch.tensor([0, *itertools.accumulate(map(len, owned))])
    indices = torch.tensor([0, *itertools.chain(*owned)], dtype=torch.int32).to(device)[1:]
    return {
        "indptr": indptr.to(device, torch.int64 if case.table == "csr64" else torch.int32),
        "indices": indices,
    }


_CONSTRUCTORS = {
    "block": BlockSparse.from_block_table,
    "token": BlockSparse.from_token_table,
    "csr": BlockSparse.from_csr,
}


def tree_tokens(case: Case) -> int:
    return case.tree_tokens or max(case.q_lens)


def tree_mask(case: Case) -> torch.Tensor:
    """int64 [requests * tree_tokens]: a tree for each request; noise where no query token has a word."""
    rng = random.Random(case.seed)
    words: list[int] = []
    size = tree_tokens(case)
    for q_len in case.q_lens:
        tree: list[int] = []
        for i in range(size):
            if case.tree == "chain":
                tree.append((2 << i) - 1)
            else:
                above = tree[rng.randrange(i)] if i else 0
                tree.append(0 if case.tree == "blind" and i % 2 else above | 1 << i)
        words += [rng.getrandbits(64) for _ in range(size - q_len)] + tree[max(0, size - q_len) :]
    return torch.tensor([w - (w >> 63 << 64) for w in words], dtype=torch.int64)


def _packed_mask(case: Case, rng: torch.Generator) -> dict[str, torch.Tensor]:
    """Random bits; a byte of nobody after each request."""
    packed, indptr = [], [0]
    for q_len, kv_len in zip(case.q_lens, case.kv_lens, strict=True):
        bits = torch.randint(2, (-(-q_len * kv_len // 8) + 1, 8), generator=rng)
        packed.append((bits << torch.arange(8)).sum(1).to(torch.uint8))
        indptr.append(indptr[-1] + len(bits))
    return {"packed_mask": torch.cat(packed), "mask_indptr": torch.tensor(indptr, dtype=torch.int32)}


def make(case: Case, device: torch.device | str = "cpu") -> Inputs:
    device, dtype = torch.device(device), DTYPES[case.dtype]
    rng = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).to(device, dtype)

    need = [-(-n // case.page_size) for n in case.kv_lens]
    runs = torch.randperm(-(-sum(need) // case.run), generator=rng)
    pages = (runs[:, None] * case.run + torch.arange(case.run)).flatten()
    order = iter((pages[pages < sum(need)] + 1).tolist())
    owned = [[next(order) for _ in range(n)] for n in need]
    for first, requests, keys in case.prefixes:
        shared = -(-keys // case.page_size)
        for row in owned[first + 1 : first + requests]:
            row[:shared] = owned[first][:shared]
    kv = _empty_cache(case, sum(need) + 2, dtype, device)
    for row, kv_len in zip(owned, case.kv_lens, strict=True):
        token = torch.arange(kv_len)
        at = torch.tensor(row, dtype=torch.int64)[token // case.page_size], token % case.page_size
        kv.k[at] = normal(kv_len, case.kv_heads, kv.head_dim_qk)
        kv.v[at] = normal(kv_len, case.kv_heads, kv.head_dim_vo)

    lens = torch.tensor(case.kv_lens, dtype=torch.int32, device=device)
    qo_indptr = torch.tensor([0, *itertools.accumulate(case.q_lens)], dtype=torch.int32, device=device)
    tables = _tables(case, owned, device)
    batch = _CONSTRUCTORS[case.table.removesuffix("64")](qo_indptr, lens, page_size=case.page_size, **tables)

    tokens = sum(case.q_lens) + case.extra_tokens
    # an engine's q is a slice of the fused projection: rows lie further apart than they are long
    q = torch.full((tokens, case.q_heads + 2, case.head_dim), POISON, dtype=dtype, device=device)[
        :, : case.q_heads
    ]
    q[: sum(case.q_lens)] = normal(sum(case.q_lens), case.q_heads, case.head_dim)
    out = torch.full((tokens, case.q_heads, kv.head_dim_vo), POISON, dtype=dtype, device=device)
    lse = torch.full((tokens, case.q_heads), POISON, dtype=torch.float32, device=device)

    variant = parse(case.variant)
    values = {
        "window": case.window,
        "soft_cap": case.soft_cap,
        "sigmoid_bias": -2.0,
        "alibi_slopes": (2.0 ** -torch.arange(1, case.q_heads + 1).div(case.q_heads / 8)).to(device),
        "sinks": torch.randn(case.q_heads, generator=rng).to(device),
        "q_norm": 0.5 + torch.rand(case.head_dim, generator=rng).to(device),
        "k_norm": 0.5 + torch.rand(case.head_dim, generator=rng).to(device),
        "norm_epsilon": 1e-5,
    }
    if TREE in variant:
        values |= {"tree_mask": tree_mask(case).to(device), "tree_tokens": tree_tokens(case)}
    for arg in variant.args:
        if arg.name == "rope_turns":
            values |= {"rope_turns": rope_turns(2 * (arg.elements or case.head_dim // 2), device=device)}
    if DOCUMENT in variant:  # of some 30 keys each
        begins = torch.rand(len(case.kv_lens), max(1, 1, *case.kv_lens), generator=rng) < 1 / 30
        values["document_ids"] = begins.cumsum(1).to(device, torch.int32)
    if PREFIX_LM in variant:
        values["prefix_len"] = torch.tensor([n * 2 // 3 for n in case.kv_lens]).to(device, torch.int32)
    if PACKED_MASK in variant:
        values |= {name: x.to(device) for name, x in _packed_mask(case, rng).items()}
    args = {a.name: values[a.name] for a in variant.args}
    return Inputs(case, q, kv, batch, out, lse, variant, args)
