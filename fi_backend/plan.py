"""Planner: lengths of a batch -> balanced work items in buffers whose shape depends on capacity alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from . import custom_ops, debug, env, jit
from .formats import BlockSparse, Composable
from .prefixes import PrefixFinder
from .variants import Variant, check_requests

if TYPE_CHECKING:
    from .measure import Times

_ITEM_INTS = 8  # WorkItem in csrc/params.h
_HEADER_INTS = 16  # PlanHeader
_ALIGNMENT = 256  # bytes, of the parts of a workspace
_RING = 4  # plans whose copies to the device may be in flight


@dataclass(frozen=True)
class Tiles:
    """Shape of the work: rows of a wide and of a narrow row tile, KV tokens of a tile, persistent workers.

    room: the executor they are for, 0 (cpu), 80 or 90: its costs, and in how many rounds it can walk a plan.
    """

    q_wide: int
    q_narrow: int
    kv: int
    workers: int
    room: int = 80

    @classmethod
    def for_device(
        cls,
        device: torch.device | str,
        head_dim_qk: int,
        head_dim_vo: int,
        batch_invariant: bool = False,
    ) -> Tiles:
        """What the executor of this device is compiled for: a multiple of its multiprocessors or threads."""
        device = torch.device(device)
        if device.type == "cpu":
            units = torch.get_num_threads()
        else:
            units = torch.cuda.get_device_properties(device).multi_processor_count
        return cls.for_arch(jit.arch_of(device), units, head_dim_qk, head_dim_vo, batch_invariant)

    @classmethod
    def for_arch(
        cls, arch: int, units: int, head_dim_qk: int, head_dim_vo: int, batch_invariant: bool = False
    ) -> Tiles:
        """What a device with so many multiprocessors or threads has. arch: 0 for a CPU, else 80, 90, ..."""
        room = jit.room_of(arch, head_dim_qk, head_dim_vo, batch_invariant)
        numbers = jit.core().plan_tiles(room, arch, head_dim_qk, head_dim_vo)
        q_wide, q_narrow, kv, per_unit, most = numbers
        return cls(q_wide, q_narrow, kv, min(units * per_unit, most), room)


class CostModel(NamedTuple):
    """The numbers of csrc/cost.h. An item costs narrow_item + KV tiles * narrow, or the same of wide ones, of
    which tiles of prefixes cost `prefix`."""

    narrow_item: int
    narrow: int
    wide_item: int
    wide: int
    prefix: int
    min_tiles: int
    min_slice: int
    uncut: int
    spread_slack: int
    chunk_tiles: int

    def of_items(
        self, kv_tiles: np.ndarray, wide: np.ndarray, of_prefix: np.ndarray | bool = False
    ) -> np.ndarray:
        """kv_tiles, wide, of_prefix: of each item."""
        narrow_cost = self.narrow_item + kv_tiles * self.narrow
        wide_cost = self.wide_item + kv_tiles * np.where(of_prefix, self.prefix, self.wide)
        return np.where(wide, wide_cost, narrow_cost)


def cost_model(room: int = 80) -> CostModel:
    """room: of the executor, 0 (cpu), 80 or 90."""
    return CostModel(*jit.core().plan_cost_model(room))


class _Layout(NamedTuple):
    """Capacities and byte offsets of the plan buffer: PlanLayout in csrc/core/plan.h."""

    max_segments: int
    max_items: int
    max_slots: int
    max_merges: int
    max_slices: int
    list_lines: int
    list_width: int
    worker_indptr: int
    merges: int
    segment_start: int
    segment_node: int
    segment_tile: int
    chunk_slot: int
    chunk_merge: int
    items: int
    list_counts: int
    list_tiles: int
    first_slot: int
    levels_for_run: int
    node_segment: int
    parts: int
    segment_rows: int
    unit_cuts: int
    bytes: int


class _StagingRing:
    """Pinned copies of a plan buffer. One is written again only after its copy to the device has finished."""

    def __init__(self, size: int) -> None:
        self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(_RING)]
        self._copied = [torch.cuda.Event() for _ in range(_RING)]
        self._turn = 0

    def acquire(self) -> torch.Tensor:
        self._turn = (self._turn + 1) % _RING
        self._copied[self._turn].synchronize()
        return self._buffers[self._turn]

    def send(self, to: torch.Tensor, used: int) -> None:
        """Copies the acquired buffer's first bytes on the current stream."""
        to[:used].copy_(self._buffers[self._turn][:used], non_blocking=True)
        self._copied[self._turn].record()


class Planner:
    """Owns the buffers of one plan at a time; every address and shape is fixed here.

    batch_invariant: the bits of a row's out and lse depend on its request's keys and its position alone: not
    on other requests, nor on how many query tokens of its own request are in the batch. For that, keys are
    joined chunk by chunk, and requests of more than q_narrow rows are not split.

    max_requests and max_tokens (query tokens of a batch) are capacities; max_tokens * (q_heads / kv_heads)^2
    must be below 2^32. max_kv_len is needed when batch_invariant or with skip, otherwise it only bounds what
    the host planner accepts. causal, by default True: keys after a row are not planned for. window: keys
    (q - window, q] are planned for, None for all. workspace: any contiguous tensor of at least
    workspace_bytes on the device, for the partial states of split tiles, or a function (device,
    workspace_bytes) that returns one; planners whose attention never overlaps may share one.

    skip: a variant of masks and ranges of keys, the same for all heads. KV tiles of which no row of a row
    tile sees a key are neither planned for nor loaded, and `plan` takes the variant's arguments. In place of
    causal and window; lengths must be exact when planned; the plan runs with variants that have all of skip.

    levels: 1, or of Composable formats how many a row's keys may be in, from 2 to 8: prefixes above one
    another, and what they leave. Such a planner needs max_kv_len and takes at most 1024 requests; lengths
    must be exact when planned; not with window, skip or batch_invariant. max_shared_tokens: query tokens
    that read prefixes, by default max_requests, which is enough for decode; `plan` shares the keys of
    requests of at most max_shared_tokens // max_requests query tokens. share: "auto", keys are shared where
    that saves time by csrc/cost.h, or "always". Variants that change keys or values do not run with levels.

    Raises ValueError for numbers that make no sense or do not fit.
    """

    def __init__(
        self,
        *,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        head_dim_vo: int | None = None,
        max_requests: int,
        max_tokens: int,
        max_kv_len: int | None = None,
        causal: bool | None = None,
        window: int | None = None,
        skip: Variant | None = None,
        batch_invariant: bool = False,
        levels: int = 1,
        max_shared_tokens: int | None = None,
        share: str = "auto",
        device: torch.device | str,
        tiles: Tiles | None = None,
        workspace: torch.Tensor | Callable[[torch.device, int], torch.Tensor] | None = None,
    ) -> None:
        import tvm_ffi

        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if kv_heads < 1 or q_heads < 1 or q_heads % kv_heads:
            raise ValueError(f"expected q_heads a multiple of kv_heads, got {q_heads} and {kv_heads}")
        if window is not None and window < 1:
            raise ValueError(f"expected window of at least 1 token, or None, got {window}")
        if max_kv_len is not None and max_kv_len < 1:
            raise ValueError(f"expected max_kv_len of at least 1 token, or None, got {max_kv_len}")
        if skip is not None:
            _check_skip(skip, causal, window)
        if share not in ("auto", "always"):
            raise ValueError(f'expected share="auto" or share="always", got {share!r}')
        self.q_heads, self.kv_heads, self.group = q_heads, kv_heads, q_heads // kv_heads
        self.head_dim_qk, self.head_dim_vo = head_dim, head_dim if head_dim_vo is None else head_dim_vo
        jit.check_head_dims(jit.arch_of(device), self.head_dim_qk, self.head_dim_vo)
        self.max_requests, self.max_tokens, self.max_kv_len = max_requests, max_tokens, max_kv_len
        self.causal = skip is None if causal is None else causal
        self.window, self.skip, self.batch_invariant = window, skip, batch_invariant
        self.device = device
        self.tiles = tiles or Tiles.for_device(device, self.head_dim_qk, self.head_dim_vo, batch_invariant)
        self._core: Any = jit.core()
        self.levels = levels
        self.finder = self._make_finder(max_shared_tokens, share == "always") if levels != 1 else None
        self._config = tvm_ffi.Shape(
            (
                kv_heads,
                self.group,
                self.tiles.workers,
                self.tiles.q_wide,
                self.tiles.q_narrow,
                self.tiles.kv,
                self.tiles.room,
                int(self.causal),
                window or 0,
                cost_model().chunk_tiles if batch_invariant else 0,
                max_requests,
                max_tokens,
                max_kv_len or 0,
                int(skip is not None),
                levels,
                *((0, 0, 0, 0, 0) if self.finder is None else self.finder.tree),
            )
        )
        self.layout = _Layout(*self._core.plan_layout(self._config))
        self._smxx = jit.smxx(jit.arch_of(device)) if device.type == "cuda" else None
        self._lister = None if skip is None else jit.tile_lister(jit.arch_of(device), skip)
        self._skipped_with: dict[str, Any] = {}  # the numbers among skip's arguments, and ...
        self._exact: tuple[torch.Tensor, ...] = ()  # ... lengths of the last plan, where run can compare them
        self._ring: _StagingRing | None = None
        self.planned: BlockSparse | None = None  # whose lengths the buffers hold
        self._debug = env.debug()

        buffer = torch.zeros(self.layout.bytes + 63, dtype=torch.uint8, device=device)
        offset = -buffer.data_ptr() % 64
        self._buffer = buffer[offset : offset + self.layout.bytes]
        self.header = self._view(0, (_HEADER_INTS,))
        self.worker_indptr = self._view(self.layout.worker_indptr, (self.layout.max_slices + 1,))
        self.items = self._view(self.layout.items, (self.layout.max_items, _ITEM_INTS))
        self.merges = self._view(self.layout.merges, (self.layout.max_merges, _ITEM_INTS))
        self.partial_o, self.partial_lse, self.partial_sum = self._partials(workspace)
        self.list_counts = self._view(self.layout.list_counts, (self.layout.list_lines,))
        self.tile_list = self._view(self.layout.list_tiles, (self.layout.list_lines, self.layout.list_width))

    def _make_finder(self, max_shared_tokens: int | None, always: bool) -> PrefixFinder:
        if self.max_kv_len is None:
            raise ValueError(f"expected max_kv_len with levels of {self.levels}, got None")
        return PrefixFinder(
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim_qk,
            head_dim_vo=self.head_dim_vo,
            tile_kv=self.tiles.kv,
            max_requests=self.max_requests,
            max_shared_tokens=self.max_requests if max_shared_tokens is None else max_shared_tokens,
            max_kv_len=self.max_kv_len,
            max_depth=self.levels - 1,
            always=always,
            device=self.device,
        )

    @property
    def plan_bytes(self) -> int:
        """Device bytes of the plan itself."""
        return self.layout.bytes

    @property
    def workspace_bytes(self) -> int:
        """Bytes of partial states, for any group: slots * partial_rows * (head_dim_vo + 1) floats; batch
        invariant: (slots * partial_rows + workers * q_wide) * (head_dim_vo + 2). slots: max_slots of the
        layout, and before them first_slot for rows in several levels."""
        return self._lse_offset + self._states * (8 if self.batch_invariant else 4)

    @property
    def _states(self) -> int:
        of_workers = self.tiles.workers * self.tiles.q_wide if self.batch_invariant else 0
        return self.worker_state + of_workers

    @property
    def worker_state(self) -> int:
        """Rows of partial states before those of the workers, which only batch invariant plans have."""
        return (self.layout.first_slot + self.layout.max_slots) * self.partial_rows

    @property
    def partial_rows(self) -> int:
        """Rows of a partial state. Batch invariant plans split narrow tiles alone."""
        return self.tiles.q_narrow if self.batch_invariant else self.tiles.q_wide

    @property
    def _lse_offset(self) -> int:
        return math.ceil(self._states * self.head_dim_vo * 4 / _ALIGNMENT) * _ALIGNMENT

    def _view(self, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
        return self._buffer[offset : offset + math.prod(shape) * 4].view(torch.int32).view(shape)

    def _partials(
        self, workspace: torch.Tensor | Callable[[torch.device, int], torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        wanted = self.workspace_bytes
        if workspace is None:
            workspace = torch.empty(wanted, dtype=torch.uint8, device=self.device)
        elif not isinstance(workspace, torch.Tensor):
            workspace = workspace(self.device, wanted)
        found = workspace.numel() * workspace.element_size()
        if workspace.device != self.device:
            raise ValueError(f"expected the workspace on {self.device}, got one on {workspace.device}")
        if not workspace.is_contiguous():
            raise ValueError(f"expected a contiguous workspace, got strides {list(workspace.stride())}")
        if found < wanted:
            raise ValueError(f"expected a workspace of at least {wanted} bytes, got {found}")
        if workspace.data_ptr() % 16:
            raise ValueError(
                f"expected the workspace aligned to 16 bytes, got {workspace.data_ptr() % 16} past"
            )
        memory = workspace.view(-1).view(torch.uint8)
        states, dim = self._states, self.head_dim_vo
        partial_o = memory[: states * dim * 4].view(torch.float32).view(states, dim)
        scalars = memory[self._lse_offset : wanted].view(torch.float32)
        return partial_o, scalars[:states], scalars[states:] if self.batch_invariant else None

    @property
    def levels_addresses(self) -> tuple[int, int, int]:
        """Of composable formats what executors read: levels in the plan's buffer, prefixes and places."""
        if self.finder is None:
            return 0, 0, 0
        levels = self._buffer.data_ptr() + self.layout.levels_for_run
        return levels, self.finder.prefixes.data_ptr(), self.finder.places.data_ptr()

    def plan(
        self,
        batch: BlockSparse | Composable,
        *,
        on: str = "device",
        qo_indptr_cpu: torch.Tensor | None = None,
        kv_len_cpu: torch.Tensor | None = None,
        **skip_args: Any,
    ) -> Plan:
        """Plans this batch, into the same buffers as the last plan.

        on="device": where the batch's own lengths lie; on a GPU without synchronising, on the current stream,
        and capturable. on="host": from qo_indptr_cpu [R + 1] and kv_len_cpu [R] int32, copied to the GPU on
        the current stream. kv_len may be an upper bound of the true length, qo_indptr must be exact.

        skip_args: the arguments of the planner's skip, which `run` must be given too: numbers are compared,
        tensors must hold the same. With skip kv_len must be exact, because masks count from a row's position
        (compared by `run` on a CPU, and with FI_DEBUG=1), and on="device".

        A Composable batch takes a planner of several levels, exact lengths and on="device". On a GPU one with
        prefixes takes its lengths as qo_indptr_cpu and kv_len_cpu too, and cannot be captured. With levels a
        `run` that is captured alone follows plans of any number of requests in the same memory, unless it was
        captured on one request: then it follows only plans without prefixes. This is not checked.

        Raises ValueError or TypeError for lengths of the wrong shape, dtype or device, and, where they are
        read on the host, for lengths beyond the capacities. On a GPU those give an empty plan: Plan.check.
        """
        if on not in ("device", "host"):
            raise ValueError(f'expected on="device" or on="host", got {on!r}')
        if self._smxx is not None and torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                lengths = {"qo_indptr_cpu": qo_indptr_cpu, "kv_len_cpu": kv_len_cpu}
                return self.plan(batch, on=on, **lengths, **skip_args)
        if self.finder is not None or isinstance(batch, Composable):
            batch = self._share(batch, on, qo_indptr_cpu, kv_len_cpu)
        if self.skip is not None or skip_args:
            self.list_tiles(batch, on, skip_args)
        if self._smxx is None:
            self._core.plan_host(self._config, self._buffer, batch.qo_indptr, batch.kv_len)
        elif on == "host":
            self._plan_from_host(batch, qo_indptr_cpu, kv_len_cpu)
        else:
            smxx = self._smxx
            self._core.plan_device(
                self._config, self._buffer, batch.qo_indptr, batch.kv_len, smxx.plan, smxx.error
            )
        last = self.planned
        if last is None or not self._same_lengths(last, batch):
            self.planned = last = batch
        plan = Plan(self, batch, last)
        if self._debug and not (self._smxx and torch.cuda.is_current_stream_capturing()):
            plan.check()
        return plan

    def _same_lengths(self, last: BlockSparse, batch: BlockSparse) -> bool:
        """Whether both have the same work items; with levels those depend on the page table too."""
        lengths = last.qo_indptr is batch.qo_indptr and last.kv_len is batch.kv_len
        return lengths and (self.finder is None or last.same_table(batch))

    def _share(
        self,
        given: BlockSparse | Composable,
        on: str,
        qo_indptr: torch.Tensor | None,
        kv_len: torch.Tensor | None,
    ) -> BlockSparse:
        """The first step of `plan` with levels: the tree of prefixes, which the planner then reads."""
        if self.finder is None:
            raise ValueError("expected a planner with levels of at least 2 for a Composable batch, got 1")
        if on != "device":
            raise ValueError(f'expected on="device" with levels of {self.levels}, got on={on!r}')
        batch, prefixes = (given.batch, given.prefixes) if isinstance(given, Composable) else (given, [])
        if prefixes is None and self.shares(batch):
            self.finder.find(batch)
            return batch
        if not prefixes:
            self.finder.clear()
            return batch
        if self._smxx is None:
            qo_indptr, kv_len = batch.qo_indptr, batch.kv_len
        elif qo_indptr is None or kv_len is None:
            raise ValueError("expected qo_indptr_cpu and kv_len_cpu with prefixes on a GPU, got None")
        if self._smxx is None or self._debug:
            debug.check_prefixes(batch, prefixes)
        self.finder.set(prefixes, qo_indptr, kv_len)
        return batch

    def shares(self, batch: BlockSparse) -> bool:
        """Whether its plan has levels. One request shares nothing, and the kernel without them is faster."""
        return self.finder is not None and batch.num_requests > 1

    def list_tiles(self, batch: BlockSparse, on: str, skip_args: dict[str, Any]) -> None:
        """The first step of `plan`: fills list_counts and tile_list from what skip sees."""
        if self.skip is None or self._lister is None:
            raise ValueError(f"expected no {', '.join(skip_args)} without skip, which takes such arguments")
        if on != "device":
            raise ValueError(f'expected on="device" with skip, whose tensors lie there, got on={on!r}')
        packed = self.skip.pack(skip_args, self.q_heads, self.device)
        check_requests(self.skip, skip_args, batch.num_requests)
        if self._smxx is None or self._debug:
            debug.check_tensors(self.skip, skip_args, batch)
        lister = self._lister
        self._core.list_tiles(
            self._config,
            self._buffer,
            batch.qo_indptr,
            batch.kv_len,
            lister.tile_list,
            lister.error,
            packed,
        )
        self._skipped_with = {a.name: skip_args[a.name] for a in self.skip.args if a.kind != "tensor"}
        compared = self._smxx is None or (self._debug and not torch.cuda.is_current_stream_capturing())
        self._exact = (batch.qo_indptr.clone(), batch.kv_len.clone()) if compared else ()

    def check_skipped(self, batch: BlockSparse, variant_args: dict[str, Any]) -> None:
        """Raises ValueError if `run` is given other numbers or lengths than the last plan, which skips."""
        for name, planned in self._skipped_with.items():
            if variant_args[name] != planned:
                raise ValueError(f"expected {name} of {planned} (the plan's skip), got {variant_args[name]}")
        for name, exact in zip(("qo_indptr", "kv_len"), self._exact, strict=False):
            if not torch.equal(found := getattr(batch, name), exact):
                raise ValueError(
                    f"expected {name} as planned with skip, {exact.tolist()}, got {found.tolist()}"
                )

    def _plan_from_host(
        self, batch: BlockSparse, qo_indptr: torch.Tensor | None, kv_len: torch.Tensor | None
    ) -> None:
        if qo_indptr is None or kv_len is None:
            raise ValueError('expected qo_indptr_cpu and kv_len_cpu with on="host", got None')
        if kv_len.shape[0] != batch.num_requests:
            raise ValueError(f"expected kv_len_cpu of {batch.num_requests} requests, got {kv_len.shape[0]}")
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError('expected on="device" while a graph is captured, got on="host"')
        if self._ring is None:
            self._ring = _StagingRing(self.layout.bytes)
        used = self._core.plan_host(self._config, self._ring.acquire(), qo_indptr, kv_len)
        self._ring.send(self._buffer, used)


def _check_skip(skip: Variant, causal: bool | None, window: int | None) -> None:
    if not isinstance(skip, Variant):
        raise TypeError(f"expected skip to be a Variant, got {type(skip).__name__}")
    if causal is not None or window is not None:
        raise ValueError(
            f"expected skip without causal and window, which it may be made of, got {skip}, causal={causal} "
            f"and window={window}"
        )
    for feature in skip.features:
        if feature.mask is None:
            raise ValueError(f"expected skip of masks and ranges of keys alone, got {feature.name} in {skip}")
        if "q_head" in feature.text:  # items of all KV heads have one list
            raise ValueError(f"expected skip that is the same for all heads, got {feature.name}: q_head")


@dataclass(frozen=True, eq=False)
class Plan:
    """A planned batch: what `run` takes. Valid until its planner, which owns the buffers, plans anew."""

    planner: Planner
    batch: BlockSparse
    planned: BlockSparse  # whose lengths became work items; `rebind` changes `batch` alone
    handle: torch.Tensor = field(init=False, repr=False)  # stands for the plan in a graph of torch.compile

    def __post_init__(self) -> None:
        object.__setattr__(self, "handle", custom_ops.handle_for(self))

    @property
    def header(self) -> torch.Tensor:
        """[16] int32: items, merges, slots, segments, slice, total (int64 both), error, rounds, state_rows,
        places, prefix_cost, 3 unused."""
        return self.planner.header

    @property
    def worker_indptr(self) -> torch.Tensor:
        """[max_slices + 1], of which rounds * workers + 1 count, int32 offsets into items."""
        return self.planner.worker_indptr

    @property
    def items(self) -> torch.Tensor:
        """[max_items, 8] int32: request, row_begin, kv_head, kv_begin, kv_end, slot, flags, level. With
        levels request ~i is prefix i of the tree, and slots below -1 are -2 - row of partial_o."""
        return self.planner.items

    @property
    def merges(self) -> torch.Tensor:
        """[max_merges, 8] int32: as items, but first and end slot for kv_begin and kv_end, and slot -1."""
        return self.planner.merges

    @property
    def partial_o(self) -> torch.Tensor:
        """[rows, head_dim_vo] float32: partial_rows a slot; batch invariant: then q_wide a worker."""
        return self.planner.partial_o

    @property
    def partial_lse(self) -> torch.Tensor:
        """[rows] float32, log2."""
        return self.planner.partial_lse

    def rebind(self, batch: BlockSparse) -> Plan:
        """The same work items over another page table. Its lengths must be equal (on a GPU: only their number
        is checked). Not with levels: work items are of what the page table shares."""
        if self.planner.finder is not None:
            raise ValueError(f"expected a planner of levels=1 to rebind, got {self.planner.levels}")
        if batch.num_requests != self.batch.num_requests:
            raise ValueError(
                f"expected a batch of {self.batch.num_requests} requests, got {batch.num_requests}"
            )
        if batch.device != self.batch.device:
            raise ValueError(f"expected a batch on {self.batch.device}, got {batch.device}")
        if batch.device.type == "cpu" and not (
            torch.equal(batch.qo_indptr, self.batch.qo_indptr)
            and torch.equal(batch.kv_len, self.batch.kv_len)
        ):
            raise ValueError("expected a batch of the planned lengths, got other qo_indptr or kv_len")
        return Plan(self.planner, batch, self.planned)

    def check(self) -> None:
        """Waits for the plan. Raises RuntimeError if its lengths exceeded the planner's capacities."""
        if self.header[8].item():
            p = self.planner
            raise RuntimeError(
                f"expected lengths within max_tokens {p.max_tokens} and max_kv_len {p.max_kv_len}, "
                f"got a batch of more than {p.layout.max_segments} row tiles"
            )

    def show(self, path: str | Path | None = None, times: Times | None = None) -> str:
        """Draws who does what: the load of every worker by csrc/cost.h, and measured where times are given.

        Returns a text for a terminal; with a path ending in .svg also writes a chart there. times: what
        `measure` returned for this plan. Waits for the plan; raises ValueError, or what `check` raises.
        """
        from .show import show  # knows this file, and no engine needs it

        return show(self, path, times)
