"""Formats: what they hold, that nothing is copied, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import LAYOUTS, TABLES, Case, make

from fi_backend import BlockSparse, KVCache, eager

CASE = Case((1, 3, 2), (40, 0, 17), page_size=8)


def test_packed_is_a_view_of_both_halves() -> None:
    cache = torch.arange(2 * 3 * 4 * 10, dtype=torch.float32).view(
        2, 3, 4, 10
    )  # [pages, heads, tokens, 2 * 5]
    kv = KVCache.packed(cache)
    assert (kv.num_pages, kv.page_size, kv.kv_heads, kv.head_dim_qk, kv.head_dim_vo) == (2, 4, 3, 5, 5)
    assert kv.k.data_ptr() == cache.data_ptr() and kv.v.data_ptr() == cache.data_ptr() + 5 * 4
    assert torch.equal(kv.k[1, 2, 0], cache[1, 0, 2, :5]) and torch.equal(kv.v[1, 2, 0], cache[1, 0, 2, 5:])


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_separate(layout: str) -> None:
    shape = (2, 4, 3, 8) if layout == "NHD" else (2, 3, 4, 8)
    k, v = torch.randn(shape), torch.randn(*shape[:3], 16)
    kv = KVCache.separate(k, v, layout)
    assert (kv.page_size, kv.kv_heads, kv.head_dim_qk, kv.head_dim_vo) == (4, 3, 8, 16)
    assert kv.k.data_ptr() == k.data_ptr() and kv.v.data_ptr() == v.data_ptr()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("table", TABLES)
def test_every_form_names_the_same_keys(layout: str, table: str) -> None:
    plain, other = make(CASE), make(replace(CASE, layout=layout, table=table))
    for request, kv_len in enumerate(CASE.kv_lens):
        for side in ("k", "v"):
            a, b = (
                eager.gather(getattr(x.kv, side), eager.pages_of(x.batch, request), kv_len)
                for x in (plain, other)
            )
            assert torch.equal(a, b) and not a.isnan().any()


@pytest.mark.parametrize("table", TABLES)
def test_tables_are_not_copied(table: str) -> None:
    batch = make(replace(CASE, table=table)).batch
    assert batch.num_requests == 3
    assert batch.table_size <= batch.table.untyped_storage().nbytes() // 4 - batch.table.storage_offset()


def _lens(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_empty_batch() -> None:
    batch = BlockSparse.from_block_table(_lens(0), _lens(), torch.zeros(0, 0, dtype=torch.int32), 16)
    assert batch.num_requests == 0 and batch.table_size == 0


@pytest.mark.parametrize(
    ("make_it", "error", "message"),
    [
        (
            lambda: KVCache(torch.ones(2, 3, 4), torch.ones(2, 3, 4)),
            ValueError,
            r"expected k \[pages.*got shape \[2, 3, 4\]",
        ),
        (lambda: KVCache.packed(torch.ones(2, 3, 4, 7)), ValueError, "even last dimension, got 7"),
        (
            lambda: KVCache.separate(*[torch.ones(2, 3, 4, 8)] * 2, layout="NDH"),
            ValueError,
            "NHD or HND, got 'NDH'",
        ),
        (
            lambda: KVCache(torch.ones(2, 3, 4, 8), torch.ones(2, 3, 5, 8)),
            ValueError,
            r"\[2, 3, 4, 8\] and \[2, 3, 5, 8\]",
        ),
        (
            lambda: KVCache(torch.ones(2, 3, 4, 8), torch.ones(2, 3, 4, 8).half()),
            TypeError,
            "float32 and torch.float16",
        ),
        (lambda: KVCache(*[torch.ones(2, 3, 4, 8).double()] * 2), TypeError, "got torch.float64"),
        (lambda: KVCache(*[torch.ones(2, 3, 8, 4).mT] * 2), ValueError, "contiguous head_dim, got strides"),
        (
            lambda: BlockSparse.from_block_table(_lens(0, 1, 2), _lens(3), torch.zeros(1, 1).int(), 16),
            ValueError,
            "qo_indptr of 2 entries .kv_len has 1., got 3",
        ),
        (
            lambda: BlockSparse.from_block_table(_lens(0, 1).long(), _lens(3), torch.zeros(1, 1).int(), 16),
            TypeError,
            "expected qo_indptr of torch.int32, got torch.int64",
        ),
        (
            lambda: BlockSparse.from_block_table(_lens(0, 1), _lens(3), torch.zeros(1, 1), 16),
            TypeError,
            "expected page table of torch.int32, got torch.float32",
        ),
        (
            lambda: BlockSparse.from_block_table(_lens(0, 1), _lens(3), torch.zeros(0, 1).int(), 16),
            ValueError,
            "block_table of at least 1 rows, got 0",
        ),
        (
            lambda: BlockSparse.from_block_table(_lens(0, 1), _lens(3), torch.zeros(1, 1).int(), 0),
            ValueError,
            "page_size of at least 1, got 0",
        ),
        (
            lambda: BlockSparse.from_csr(_lens(0, 1), _lens(3), _lens(0), _lens(0), 16),
            ValueError,
            r"indptr of at least 2 entries, got shape \[1\]",
        ),
        (
            lambda: BlockSparse(_lens(0, 1, 2), _lens(3, 3), _lens(0, 0), _lens(0), 1, 1, False, 16),
            ValueError,
            r"starts of at least 2 entries, got shape \[1\]",
        ),
        (
            lambda: BlockSparse.from_token_table(
                _lens(0, 1), _lens(3), torch.zeros(1, 1).int(), torch.ones(1), 1
            ),
            TypeError,
            "expected starts of torch.int32 or torch.int64, got torch.float32",
        ),
    ],
)
def test_refusals(make_it, error, message) -> None:
    with pytest.raises(error, match=message):
        make_it()
