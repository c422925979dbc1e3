"""`run` and `append` as torch custom ops, for code that torch.compile traces.

A graph takes tensors and numbers, so a Plan or a KVCache goes in as its handle: a CPU tensor that holds a
number. Guards do not look at the number, and it is read when the graph runs: no plan is baked in, and none
compiles anew. What plans and caches point to is unknown to the graph: by these ops alone may it touch page
tables and caches. (A cache that it sees torch.compile may copy, and wrongly where K and V are views of one
tensor: torch 2.13 forgets the storage offset of an input that an op mutates.)
"""

from __future__ import annotations

import functools
import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch

from .variants import Variant, parse

if TYPE_CHECKING:
    from .formats import KVCache
    from .plan import Plan


class _Ref(weakref.ref):
    __slots__ = ("owned",)
    owned: tuple[int, torch.Tensor]


_named: dict[int, _Ref] = {}
_free: list[tuple[int, torch.Tensor]] = []  # numbers and handles of what is gone
_numbers = itertools.count()

_library = torch.library.Library("fi_backend", "FRAGMENT")
# what a launch records is one plan: torch.compile must not put it into CUDA graphs of its own
_TAGS = tuple(
    getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "cudagraph_unsafe") if hasattr(torch.Tag, name)
)


def handle_for(owner: Plan | KVCache) -> torch.Tensor:
    """The owner's as long as it lives. Reused later: to make a tensor takes longer than all the rest."""
    try:
        owned = _free.pop()
    except IndexError:
        number = next(_numbers)
        with torch.inference_mode(False):  # guards tell inference tensors from others
            owned = number, torch.tensor(number, device="cpu")
    ref = _named[owned[0]] = _Ref(owner, _release)
    ref.owned = owned
    return owned[1]


def _release(ref: _Ref) -> None:
    _free.append(ref.owned)


def _owner(handle: torch.Tensor, kind: str) -> Any:
    found = _named[int(handle.item())]()
    if found is None:
        raise RuntimeError(f"expected a {kind} that is alive, got one that nothing refers to any more")
    return found


def traced_run(
    plan: Plan,
    q: torch.Tensor,
    kv: KVCache,
    out: torch.Tensor | None,
    variant: Variant,
    scale: float | None,
    lse: torch.Tensor | None,
    variant_args: dict[str, Any],
) -> torch.Tensor:
    if out is None:
        out = q.new_empty(q.shape[0], q.shape[1], kv.v.shape[3])
    tensors = {name: x for name, x in variant_args.items() if isinstance(x, torch.Tensor)}
    numbers = {name: x for name, x in variant_args.items() if name not in tensors}
    torch.ops.fi_backend.run(
        plan.handle,
        kv.handle,
        q,
        out,
        lse,
        scale,
        variant.name,
        [*tensors, *numbers],
        list(tensors.values()),
        list(numbers.values()),
    )
    return out


def traced_append(kv: KVCache, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    torch.ops.fi_backend.append(kv.handle, k, v, slot_mapping)


@functools.cache
def _variant(name: str) -> Variant:
    return parse(name)


def _run(
    plan: torch.Tensor,
    kv: torch.Tensor,
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    scale: float | None,
    variant: str,
    names: list[str],
    tensors: list[torch.Tensor],
    numbers: list[float],
) -> None:
    from .run import run

    variant_args = dict(zip(names, [*tensors, *numbers], strict=True))
    kv_cache: KVCache = _owner(kv, "cache")
    run(
        _owner(plan, "plan"),
        q,
        kv_cache,
        out,
        variant=_variant(variant),
        scale=scale,
        lse=lse,
        **variant_args,
    )


def _append(kv: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    from .run import append

    append(_owner(kv, "cache"), k, v, slot_mapping)


def _define(name: str, arguments: str, function: Any) -> None:
    _library.define(f"{name}({arguments}) -> ()", tags=_TAGS)
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fi_backend::{name}", lambda *_: None, lib=_library)


_define(
    "run",
    "Tensor plan, Tensor kv, Tensor q, Tensor(a!) out, Tensor(b!)? lse, float? scale, str variant, "
    "str[] names, Tensor[] tensors, float[] numbers",
    _run,
)
# the handle stands for the cache: what reads it later stays behind
_define("append", "Tensor(a!) kv, Tensor k, Tensor v, Tensor slot_mapping", _append)
