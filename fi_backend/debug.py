"""Checks that must read device memory back: FI_DEBUG=1 only, and never while a graph is captured."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .formats import BlockSparse
from .variants import PACKED_MASK, Variant

_FAULT_BYTES = 32  # sizeof(fi::Fault)


class Arguments:
    """A variant's arguments as its debug build takes them (csrc/arguments.h), behind a place for a fault.

    packed: as `Variant.pack` makes them of values. address: the bytes that go to the executor instead.
    """

    def __init__(
        self, variant: Variant, packed: bytes, values: Mapping[str, Any], device: torch.device
    ) -> None:
        self._variant = variant
        most = 5 * 8 * len(variant.args)  # of an argument: a pointer, what is added here, a row's length
        self._block = torch.zeros(_FAULT_BYTES + most, dtype=torch.uint8, device=device)
        fault, at, members = self._block.data_ptr(), 0, b""
        for number, arg in enumerate(variant.args):
            fields = packed[at : at + struct.calcsize("<" + arg.format)]
            at += len(fields)
            if arg.kind == "tensor":
                added = struct.pack("<qQq", math.prod(values[arg.name].shape), fault, number)
                fields = fields[:8] + added + fields[8:]
            members += fields
        end = _FAULT_BYTES + len(members)
        self._block[_FAULT_BYTES:end] = torch.frombuffer(bytearray(members), dtype=torch.uint8)
        self.address = struct.pack("<Q", fault + _FAULT_BYTES)

    def check(self) -> None:
        """Waits for the executor. Raises IndexError for the first index that was out of range."""
        found, number, index, length = self._block[:_FAULT_BYTES].view(torch.int64).tolist()
        if found:
            raise IndexError(
                f"variant {self._variant}: expected indices of 0 to {length - 1} into "
                f"{self._variant.args[number].name} of length {length}, got {index}"
            )


def capturing(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def check_page_table(batch: BlockSparse, num_pages: int, window: int | None) -> None:
    """Raises ValueError for the first page table entry that `run` would read and that names no page."""
    if capturing(batch.table):
        return
    size, table = batch.table_size, batch.table
    flat = torch.as_strided(table, (size,), (1,), table.storage_offset()) if size else table.reshape(-1)
    q_len = batch.qo_indptr.diff().tolist()
    starts = range(batch.num_requests) if batch.starts is None else batch.starts.tolist()
    for request, kv_len in enumerate(batch.kv_len.tolist()):
        if kv_len <= 0 or q_len[request] <= 0:
            continue
        pages = -(-kv_len // batch.page_size)
        skipped = 0 if window is None else max(0, kv_len - q_len[request] - window + 1) // batch.page_size
        first = starts[request] * batch.start_stride + skipped * batch.entry_step
        last = first + (pages - skipped - 1) * batch.entry_step
        if first < 0 or last >= size:
            raise ValueError(
                f"page table: request {request} needs {pages} pages, entries {first} to {last}, "
                f"expected entries of 0 to {size - 1}"
            )
        if table.dim() == 2 and (pages - 1) * batch.entry_step > (table.shape[1] - 1) * table.stride(1):
            raise ValueError(
                f"page table: request {request} needs {pages} pages of {batch.page_size} tokens, "
                f"expected no more than fit a row of {table.shape[1]} entries"
            )
        entries = flat[first : last + 1 : max(batch.entry_step, 1)]
        page_ids = entries // batch.page_size if batch.entries_are_slots else entries
        bad = ((entries < 0) | (page_ids >= num_pages)).nonzero()
        if len(bad):
            at = int(bad[0])
            limit = num_pages * batch.page_size if batch.entries_are_slots else num_pages
            what = "slot" if batch.entries_are_slots else "page"
            raise ValueError(
                f"page table: request {request}, entry {skipped + at}: expected a {what} of 0 to {limit - 1}"
                f", got {int(entries[at])}"
            )


def check_prefixes(batch: BlockSparse, prefixes: Iterable[tuple[Sequence[int], int]]) -> None:
    """Raises ValueError for the first page of a prefix that is not the same for all its requests."""
    if capturing(batch.table):
        return
    size, table = batch.table_size, batch.table
    flat = torch.as_strided(table, (size,), (1,), table.storage_offset()) if size else table.reshape(-1)
    starts = list(range(batch.num_requests)) if batch.starts is None else batch.starts.tolist()
    for requests, keys in prefixes:
        wanted: torch.Tensor | None = None
        for request in requests:
            if not 0 <= request < batch.num_requests:
                continue  # refused where the tree is made
            first, step = starts[request] * batch.start_stride, max(batch.entry_step, 1)
            last = first + (-(-keys // batch.page_size) - 1) * step
            if not 0 <= first <= last < size:
                raise ValueError(
                    f"prefix of {keys} keys: request {request} needs entries {first} to {last} of the page "
                    f"table, expected entries of 0 to {size - 1}"
                )
            entries = flat[first : last + 1 : step]
            wanted = entries if wanted is None else wanted
            if len(differ := (entries != wanted).nonzero()):
                at = int(differ[0])
                raise ValueError(
                    f"prefix of {keys} keys: expected entry {at} of request {request}'s page table to be "
                    f"{int(wanted[at])} as request {requests[0]}'s, got {int(entries[at])}"
                )


def check_tokens(batch: BlockSparse, tokens: int) -> None:
    """Raises ValueError if q has fewer tokens than the batch. On the CPU `run` always asks."""
    if not capturing(batch.table) and (end := int(batch.qo_indptr[-1])) > tokens:
        raise ValueError(f"expected q of at least {end} tokens (qo_indptr ends there), got {tokens}")


def check_slots(slot_mapping: torch.Tensor, slots: int) -> None:
    """Raises ValueError if a slot lies past the cache."""
    if slot_mapping.numel() and not capturing(slot_mapping) and (top := int(slot_mapping.max())) >= slots:
        raise ValueError(f"expected slots below {slots} (pages x page_size), got {top}")


def check_tensors(variant: Variant, args: Mapping[str, Any], batch: BlockSparse) -> None:
    """Raises ValueError for tensor arguments that lack elements for the batch's lengths."""
    for name in variant.per_key:
        check_positions(batch, name, args[name].shape[1])
    if PACKED_MASK in variant:
        check_packed_mask(batch, args["packed_mask"], args["mask_indptr"])


def check_positions(batch: BlockSparse, name: str, positions: int) -> None:
    """Raises ValueError if an argument per key has too few for a request. On the CPU `run` always asks."""
    if not capturing(batch.table) and positions < (longest := max(batch.kv_len.tolist(), default=0)):
        raise ValueError(
            f"expected {name} of at least {longest} positions (the longest request's keys), got {positions}"
        )


def check_packed_mask(batch: BlockSparse, packed_mask: Any, mask_indptr: Any) -> None:
    """Raises ValueError for the first request whose bits are not all there. On the CPU `run` always asks."""
    if capturing(batch.table):
        return
    size, lengths = packed_mask.shape[0], (batch.qo_indptr.diff().tolist(), batch.kv_len.tolist())
    for request, (q_len, kv_len, start) in enumerate(zip(*lengths, mask_indptr.tolist(), strict=False)):
        needed = -(-max(q_len, 0) * max(kv_len, 0) // 8)
        if needed and not 0 <= start <= size - needed:
            raise ValueError(
                f"packed_mask: request {request} needs {needed} bytes from mask_indptr {start} on, expected "
                f"them within 0 to {size - 1}"
            )
