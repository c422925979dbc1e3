"""One fused call per layer: attention over a plan, and the KV append that goes before it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import arrays, custom_ops, debug, env, jit
from .arrays import Array
from .formats import KVCache
from .variants import CAUSAL, WINDOW, Variant, check_requests

if TYPE_CHECKING:
    from .plan import Plan, Planner


_Key = tuple[Variant, torch.dtype, bool]  # of an executor; with levels or not


@dataclass
class _Runner:
    """What stays the same for all plans of a planner."""

    arch: int
    gpu: int | None  # index; None: the CPU
    scale: float
    debug: bool
    profile: bool
    call: Any
    executors: dict[_Key, jit.Executor]
    unchecked: dict[_Key, jit.Executor]  # with debug, on a GPU: what graphs capture
    never_ran: set[_Key]  # of those


def make_runner(planner: Planner, profile: bool = False) -> _Runner:
    core, arch, tiles = jit.core(), jit.arch_of(planner.device), planner.tiles
    dims = planner.head_dim_qk, planner.head_dim_vo
    room = jit.room_of(arch, *dims, planner.batch_invariant)
    found = (tiles.q_wide, tiles.q_narrow, tiles.kv, tiles.room)
    compiled = (*tuple(core.plan_tiles(room, arch, *dims))[:3], room)
    if found != compiled:
        raise ValueError(
            f"expected tiles of {compiled} (q_wide, q_narrow, kv, room of the compiled executor), got {found}"
        )
    gpu = planner.device.index if planner.device.type == "cuda" else None
    runner = _Runner(arch, gpu, planner.head_dim_qk**-0.5, env.debug(), profile, core.run, {}, {}, set())
    planner.__dict__["_runner"] = runner
    return runner


def bind(plan: Plan, profile: torch.Tensor | None = None) -> torch.Tensor:
    """The plan as C++ sees it: a BoundPlan, raw pointers into tensors that the plan keeps alive."""
    planner, batch, core = plan.planner, plan.batch, jit.core()
    storage = torch.empty(core.bound_bytes(), dtype=torch.uint8, device="cpu")
    core.bind(
        storage,
        batch.qo_indptr,
        batch.kv_len,
        batch.table,
        batch.starts,
        batch.start_stride,
        batch.entry_step,
        batch.entries_are_slots,
        batch.page_size,
        plan.header,
        plan.worker_indptr,
        plan.items,
        plan.merges,
        plan.partial_o,
        plan.partial_lse,
        planner.partial_sum,
        planner.partial_rows,
        planner.worker_state,
        planner.tiles.workers,
        planner.kv_heads,
        planner.group,
        planner.head_dim_qk,
        planner.head_dim_vo,
        profile,
        None if planner.skip is None else planner.tile_list,
        *planner.levels_addresses,
    )
    plan.__dict__["_bound"] = storage  # a cache: the plan itself stays frozen
    return storage


def _load(
    planner: Planner, runner: _Runner, variant: Variant, dtype: torch.dtype, levels: bool
) -> jit.Executor:
    if not isinstance(variant, Variant):
        raise TypeError(f"expected variant to be a Variant, got {type(variant).__name__}")
    if planner.causal and CAUSAL not in variant:
        raise ValueError(f"expected a causal variant (the plan dropped keys after each row), got {variant}")
    if planner.window is not None and WINDOW not in variant:
        raise ValueError(
            f"expected a variant with WINDOW (the plan kept {planner.window} keys a row), got {variant}"
        )
    if planner.skip is not None and planner.skip not in variant:
        raise ValueError(
            f"expected a variant with all of {planner.skip} (what it hides the plan skipped), got {variant}"
        )
    if dtype not in jit.DTYPES:
        raise TypeError(f"expected q of bfloat16, float16 or float32, got {dtype}")
    dims = planner.head_dim_qk, planner.head_dim_vo
    if planner.finder is not None and (changed := [f.name for f in variant.features if f.key or f.value]):
        raise ValueError(
            f"expected a variant without key and value transforms with levels of {planner.levels} (keys of a "
            f"prefix are of many requests), got {changed} in {variant}"
        )
    flags = planner.batch_invariant, runner.profile, planner.skip is not None, levels
    spec = jit.Spec(runner.arch, jit.DTYPES[dtype], *dims, variant, *flags)
    if runner.debug and variant.tensors:
        if runner.gpu is not None:
            runner.unchecked[variant, dtype, levels] = jit.executor(spec)
            runner.never_ran.add((variant, dtype, levels))
        spec = replace(spec, debug=True)
    found = runner.executors[variant, dtype, levels] = jit.executor(spec)
    return found


def run(
    plan: Plan,
    q: Array,
    kv: KVCache,
    out: Array | None = None,
    *,
    variant: Variant = CAUSAL,
    scale: float | None = None,
    lse: Array | None = None,
    **variant_args: Any,
) -> Array:
    """Attention of q against the pages of the plan's batch. Returns out.

    q [tokens, q_heads, head_dim_qk] and out [tokens, q_heads, head_dim_vo]: bf16 or f16 (f32 too on the
    CPU), any strides with a contiguous last dimension; tokens past qo_indptr[-1] are left as they are.
    Logits are scale * q.k; scale is above 0, by default head_dim_qk ** -0.5. lse [tokens, q_heads] float32 is
    filled with the natural log of the sum of exponentials; rows without keys get -inf and out 0; variants
    without softmax take none. The variant's arguments go by name.

    Runs on the current stream, allocates only `out`, never synchronises (unless FI_DEBUG=1). Raises
    ValueError or TypeError for inputs that do not fit the plan, RuntimeError when a kernel cannot be built
    or launched; with FI_DEBUG=1 IndexError for a tensor argument that the variant reads out of range.

    Arrays of other frameworks go in uncopied; without out, the result is of q's framework. The kernel runs on
    torch's current stream, which waits for the current streams of the frameworks that q, out and lse are of,
    and these for it: what they queue next may read out. JAX arrays are immutable, so refused as out and lse.

    torch.compile traces this as fi_backend::run. Plans are made, page tables written and variants composed
    outside of what it compiles; other plans of a planner are no reason to compile again.
    """
    if is_dynamo_compiling():  # is_compiling() would be true in other threads too
        return custom_ops.traced_run(plan, q, kv, out, variant, scale, lse, variant_args)
    if not (
        isinstance(q, Tensor)
        and (out is None or isinstance(out, Tensor))
        and (lse is None or isinstance(lse, Tensor))
    ):
        return _run_arrays(plan, q, kv, out, variant, scale, lse, variant_args)
    planner = plan.planner
    runner = planner.__dict__.get("_runner") or make_runner(planner)
    if runner.gpu is not None and runner.gpu != torch.cuda.current_device():
        with torch.cuda.device(runner.gpu):  # a launch goes to the current device, whatever its stream's
            return run(plan, q, kv, out, variant=variant, scale=scale, lse=lse, **variant_args)
    if plan.planned is not planner.planned:
        raise ValueError(
            "expected the last plan of its planner, got one whose work items a plan of other lengths has "
            "overwritten: run it before that, or use two planners"
        )
    key = variant, q.dtype, planner.shares(plan.batch)
    executor = runner.executors.get(key) or _load(planner, runner, *key)
    args = variant.pack(variant_args, planner.q_heads, planner.device)
    if planner.window is not None and variant_args["window"] > planner.window:
        raise ValueError(
            f"expected window of at most {planner.window} (the plan's), got {variant_args['window']}"
        )
    check_requests(variant, variant_args, plan.batch.num_requests)
    for arg in variant.per_dim:
        wanted = arg.elements or planner.head_dim_qk // (2 if arg.per == "pair" else 1)
        if (found := variant_args[arg.name].shape[0]) != wanted:
            raise ValueError(f"variant {variant}: expected {arg.name} of {wanted} elements, got {found}")
    for name in variant.per_token:
        if (found := variant_args[name].shape[0]) < q.shape[0]:
            raise ValueError(f"expected {name} of at least {q.shape[0]} tokens (q's), got {found}")
    if runner.gpu is None or runner.debug:
        debug.check_tensors(variant, variant_args, plan.batch)
    if planner.skip is not None:
        planner.check_skipped(plan.batch, variant_args)
    if lse is not None and not variant.softmax:
        raise ValueError(f"expected no lse with {variant}, which has no softmax")
    if out is None:
        out = q.new_empty(q.shape[0], planner.q_heads, planner.head_dim_vo)
    if runner.debug:
        debug.check_tokens(plan.batch, q.shape[0])
        debug.check_page_table(plan.batch, kv.num_pages, planner.window)
    if scale is None:
        scale = runner.scale
    storage = plan.__dict__.get("_bound")
    if storage is None:
        storage = bind(plan)
    if runner.debug and variant.tensors:
        if not debug.capturing(q):
            checked = debug.Arguments(variant, args, variant_args, planner.device)
            call = (q, kv.k, kv.v, out, lse, scale, checked.address)
            runner.call(storage, executor.attention, executor.error, *call)
            checked.check()
            if key not in runner.never_ran:
                return out
            runner.never_ran.remove(key)  # a kernel that a graph captures must have run before
        executor = runner.unchecked[key]
    runner.call(storage, executor.attention, executor.error, q, kv.k, kv.v, out, lse, scale, args)
    return out


def _run_arrays(
    plan: Plan,
    q: Array,
    kv: KVCache,
    out: Array | None,
    variant: Variant,
    scale: float | None,
    lse: Array | None,
    variant_args: dict[str, Any],
) -> Array:
    """`run` where not all is torch's."""
    with torch.cuda.device_of(plan.header):  # what leaves by DLPack must be on the current device
        rows = arrays.tensor("expected q", q)
        result = None if out is None else arrays.writable("expected out", out)
        sums = None if lse is None else arrays.writable("expected lse", lse)
        result = run(plan, rows, kv, result, variant=variant, scale=scale, lse=sums, **variant_args)
        arrays.hold(result.device, q, kv, out, lse, variant_args)
        if sums is not None:
            arrays.back(sums, lse)  # for its stream
        returned = arrays.back(result, q if out is None else out)
    return returned if out is None else out


def append(kv: KVCache, k: Array, v: Array, slot_mapping: Array) -> None:
    """Writes new keys and values into the cache: token i goes to slot_mapping[i] = page * page_size + offset.

    k [tokens, kv_heads, head_dim_qk], v [tokens, kv_heads, head_dim_vo] of the cache's dtype, at least as
    many tokens as slot_mapping [tokens] int64 has; a negative slot skips its token. Raises ValueError or
    TypeError; a slot past the cache is found on the CPU and, with FI_DEBUG=1, on a GPU. Other frameworks and
    torch.compile (fi_backend::append): as in `run`; the stream of k's framework waits for the cache.
    """
    if kv.read_only:
        raise ValueError("expected a cache that can be written, got one of read-only or JAX arrays")
    if is_dynamo_compiling():
        custom_ops.traced_append(kv, k, v, slot_mapping)
        return
    if not (isinstance(k, Tensor) and isinstance(v, Tensor) and isinstance(slot_mapping, Tensor)):
        _append_arrays(kv, k, v, slot_mapping)
        return
    function = error = 0
    if kv.k.is_cuda:
        if kv.device.index != torch.cuda.current_device():
            with torch.cuda.device(kv.device):  # as in run
                append(kv, k, v, slot_mapping)
            return
        smxx = jit.smxx(jit.arch_of(kv.device))
        function, error = smxx.append, smxx.error
        if env.debug():
            debug.check_slots(slot_mapping, kv.num_pages * kv.page_size)
    jit.core().append(function, error, kv.k, kv.v, k, v, slot_mapping)


def _append_arrays(kv: KVCache, k: Array, v: Array, slot_mapping: Array) -> None:
    with torch.cuda.device_of(kv.k):
        keys, values = arrays.tensor("expected k", k), arrays.tensor("expected v", v)
        append(kv, keys, values, arrays.tensor("expected slot_mapping", slot_mapping))
        arrays.hold(kv.device, kv, k, v, slot_mapping)
        arrays.back(keys, k)
