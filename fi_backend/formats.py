"""What an engine keeps in memory, as read: a paged KV cache and the sparse matrix of rows against pages.

Nothing is copied: a format holds the engine's own tensors. Strides are read, never assumed. Arrays of other
frameworks (whatever has `__dlpack__`) are held as tensors over their memory; on a GPU torch's current stream
waits for what they were made on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from . import arrays, custom_ops
from .arrays import Array

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _check_rank(name: str, x: torch.Tensor, rank: int, shape: str) -> None:
    if x.dim() != rank:
        raise ValueError(f"expected {name} {shape}, got shape {list(x.shape)}")


def _check_int(name: str, x: torch.Tensor, device: torch.device, *wanted: torch.dtype) -> None:
    if x.dtype not in wanted:
        raise TypeError(f"expected {name} of {' or '.join(map(str, wanted))}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"expected {name} on {device} (where the page table is), got {x.device}")


def _over_memory(k: Array, v: Array) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Both as tensors, and whether one of them may only be read."""
    read_only = arrays.read_only(k) or arrays.read_only(v)
    return arrays.tensor("expected k", k), arrays.tensor("expected v", v), read_only


@dataclass(frozen=True)
class KVCache:
    """Paged K and V: logical views k [pages, page_size, kv_heads, head_dim_qk], v [..., head_dim_vo].

    Any strides with head_dim contiguous; bf16, f16 or f32 (CPU only). Build one with `packed` or `separate`.
    read_only: `append` refuses it; so are JAX arrays, and NumPy arrays that are not writeable. Raises
    ValueError or TypeError if K and V do not belong together.
    """

    k: torch.Tensor
    v: torch.Tensor
    read_only: bool = field(default=False, kw_only=True)
    # stands for the cache in a graph of torch.compile
    handle: torch.Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        k, v = self.k, self.v
        if not (isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)):
            k, v, frozen = _over_memory(k, v)
            object.__setattr__(self, "read_only", self.read_only or frozen)
            object.__setattr__(self, "k", k)
            object.__setattr__(self, "v", v)
        for name, x in (("k", k), ("v", v)):
            _check_rank(name, x, 4, "[pages, page_size, kv_heads, head_dim]")
            if x.dtype not in DTYPES:
                raise TypeError(f"expected {name} of bfloat16, float16 or float32, got {x.dtype}")
            if x.stride(3) != 1 and x.shape[3] != 1:
                raise ValueError(
                    f"expected {name} with a contiguous head_dim, got strides {list(x.stride())}"
                )
        if k.shape[:3] != v.shape[:3]:
            raise ValueError(
                f"expected k and v of the same pages, page_size and kv_heads, "
                f"got {list(k.shape)} and {list(v.shape)}"
            )
        if k.dtype != v.dtype:
            raise TypeError(f"expected k and v of one dtype, got {k.dtype} and {v.dtype}")
        if k.device != v.device:
            raise ValueError(f"expected k and v on one device, got {k.device} and {v.device}")
        object.__setattr__(self, "handle", custom_ops.handle_for(self))

    @classmethod
    def packed(cls, cache: Array) -> KVCache:
        """cache [pages, kv_heads, page_size, 2 * head_dim]: K is the first half of each row, V the second."""
        frozen, cache = arrays.read_only(cache), arrays.tensor("expected packed cache", cache)
        _check_rank("packed cache", cache, 4, "[pages, kv_heads, page_size, 2 * head_dim]")
        if cache.shape[3] % 2:
            raise ValueError(f"expected a packed cache with an even last dimension, got {cache.shape[3]}")
        logical, dim = cache.transpose(1, 2), cache.shape[3] // 2
        return cls(logical[..., :dim], logical[..., dim:], read_only=frozen)

    @classmethod
    def separate(cls, k: Array, v: Array, layout: str = "NHD") -> KVCache:
        """NHD: k, v [pages, page_size, kv_heads, head_dim]; HND: [pages, kv_heads, page_size, head_dim]."""
        if layout not in ("NHD", "HND"):
            raise ValueError(f"expected layout NHD or HND, got {layout!r}")
        if layout == "NHD":
            return cls(k, v)
        k, v, frozen = _over_memory(k, v)
        _check_rank("k", k, 4, "[pages, kv_heads, page_size, head_dim]")
        _check_rank("v", v, 4, "[pages, kv_heads, page_size, head_dim]")
        return cls(k.transpose(1, 2), v.transpose(1, 2), read_only=frozen)

    @classmethod
    def slots(cls, k: Array, v: Array, page_size: int) -> KVCache:
        """k, v [slots, kv_heads, head_dim]: page p is the slots from p * page_size on."""
        k, v, frozen = _over_memory(k, v)
        _check_rank("k", k, 3, "[slots, kv_heads, head_dim]")
        _check_rank("v", v, 3, "[slots, kv_heads, head_dim]")
        pages = k.shape[0] // page_size  # slots past the last whole page belong to none
        k, v = (x[: pages * page_size].unflatten(0, (pages, page_size)) for x in (k, v))
        return cls(k, v, read_only=frozen)

    @property
    def num_pages(self) -> int:
        return self.k.shape[0]

    @property
    def page_size(self) -> int:
        return self.k.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[2]

    @property
    def head_dim_qk(self) -> int:
        return self.k.shape[3]

    @property
    def head_dim_vo(self) -> int:
        return self.v.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        return self.k.dtype

    @property
    def device(self) -> torch.device:
        return self.k.device


@dataclass(frozen=True)
class BlockSparse:
    """Which pages each request's rows see. Entry p of request r lies at

        table.flat[(starts[r] if starts is given else r) * start_stride + p * entry_step]

    and is a page id, or a token slot (page * page_size + offset) with entries_are_slots.
    qo_indptr [R + 1] int32: offsets of query tokens, the queries are the last ones of their request's keys.
    kv_len [R] int32: keys of each request, 0 is legal. Build one with a `from_` constructor.
    """

    qo_indptr: torch.Tensor
    kv_len: torch.Tensor
    table: torch.Tensor
    starts: torch.Tensor | None
    start_stride: int
    entry_step: int
    entries_are_slots: bool
    page_size: int

    def __post_init__(self) -> None:
        for name in ("qo_indptr", "kv_len", "table", "starts"):
            x = getattr(self, name)
            if x is not None and not isinstance(x, torch.Tensor):
                object.__setattr__(self, name, arrays.tensor(f"expected {name}", x))
        device = self.table.device
        for name, x in (("qo_indptr", self.qo_indptr), ("kv_len", self.kv_len)):
            _check_rank(name, x, 1, "[requests + 1]" if name == "qo_indptr" else "[requests]")
            _check_int(name, x, device, torch.int32)
            if x.shape[0] > 1 and x.stride(0) != 1:
                raise ValueError(f"expected {name} contiguous, got stride {x.stride(0)}")
        _check_int("page table", self.table, device, torch.int32)
        requests = self.kv_len.shape[0]
        if self.qo_indptr.shape[0] != requests + 1:
            raise ValueError(
                f"expected qo_indptr of {requests + 1} entries (kv_len has {requests}), "
                f"got {self.qo_indptr.shape[0]}"
            )
        if self.page_size < 1:
            raise ValueError(f"expected page_size of at least 1, got {self.page_size}")
        if self.starts is not None:
            _check_rows("starts", self.starts, requests)
            _check_int("starts", self.starts, device, torch.int32, torch.int64)
            if self.starts.shape[0] > 1 and self.starts.stride(0) != 1:
                raise ValueError(f"expected starts contiguous, got stride {self.starts.stride(0)}")

    @classmethod
    def from_block_table(
        cls, qo_indptr: Array, kv_len: Array, block_table: Array, page_size: int
    ) -> BlockSparse:
        """block_table [R, W] int32 page ids, row r for request r; its strides are read."""
        block_table = arrays.tensor("expected block_table", block_table)
        _check_rank("block_table", block_table, 2, "[requests, pages]")
        if block_table.shape[0] < kv_len.shape[0]:
            raise ValueError(
                f"expected a block_table of at least {kv_len.shape[0]} rows, got {block_table.shape[0]}"
            )
        stride, step = block_table.stride()
        return cls(qo_indptr, kv_len, block_table, None, stride, step, False, page_size)

    @classmethod
    def from_token_table(
        cls,
        qo_indptr: Array,
        kv_len: Array,
        req_to_token: Array,
        rows: Array,
        page_size: int,
    ) -> BlockSparse:
        """req_to_token [P, L] int32 token slots; rows [R] int32 or int64: the pool row of each request.

        With page_size > 1 only the slot of each page's first token is read: pages are aligned in the pool.
        """
        req_to_token = arrays.tensor("expected req_to_token", req_to_token)
        rows = arrays.tensor("expected rows", rows)
        _check_rank("req_to_token", req_to_token, 2, "[pool rows, tokens]")
        _check_rows("rows", rows, kv_len.shape[0])
        stride, step = req_to_token.stride()
        return cls(qo_indptr, kv_len, req_to_token, rows, stride, step * page_size, True, page_size)

    @classmethod
    def from_csr(
        cls,
        qo_indptr: Array,
        kv_len: Array,
        indptr: Array,
        indices: Array,
        page_size: int,
    ) -> BlockSparse:
        """indices [nnz] int32 page ids; request r begins at indptr[r]; indptr [R + 1] int32 or int64."""
        indptr, indices = arrays.tensor("expected indptr", indptr), arrays.tensor("expected indices", indices)
        _check_rank("indices", indices, 1, "[pages in use]")
        _check_rows("indptr", indptr, kv_len.shape[0] + 1)
        return cls(qo_indptr, kv_len, indices, indptr, 1, indices.stride(0), False, page_size)

    @property
    def num_requests(self) -> int:
        return self.kv_len.shape[0]

    @property
    def device(self) -> torch.device:
        return self.table.device

    @property
    def table_size(self) -> int:
        """Entries from the first of the table to its last, gaps of a strided view included."""
        if self.table.numel() == 0:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.table.shape, self.table.stride(), strict=True))

    def same_table(self, other: BlockSparse) -> bool:
        """Whether both read the same entries of the same tensors."""
        mine, its = (
            (id(b.table), id(b.starts), b.start_stride, b.entry_step, b.entries_are_slots, b.page_size)
            for b in (self, other)
        )
        return mine == its


@dataclass(frozen=True)
class Composable:
    """A batch whose requests may begin with the same keys: those are read once for all of these requests.

    prefixes: None, then `Planner.plan` finds them in the page table; or (requests, keys) pairs: keys that all
    of the requests begin with, in the same pages, a multiple of the planner's `tiles.kv`, before any of their
    query tokens. Prefixes nest or have no request in common. That pages are the same is checked on a CPU, and
    with FI_DEBUG=1. Takes a planner of several levels.
    """

    batch: BlockSparse
    prefixes: Sequence[tuple[Sequence[int], int]] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.batch, BlockSparse):
            raise TypeError(f"expected batch to be a BlockSparse, got {type(self.batch).__name__}")


def _check_rows(name: str, x: torch.Tensor, wanted: int) -> None:
    if x.dim() != 1 or x.shape[0] < wanted:
        raise ValueError(f"expected {name} of at least {wanted} entries, got shape {list(x.shape)}")
