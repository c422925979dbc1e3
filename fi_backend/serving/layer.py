"""One attention layer of an engine: what it computes, checked and composed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .. import jit, variants
from ..formats import KVCache
from ..plan import Plan
from ..run import run
from . import kernels
from .own_variant import own_variant
from .refuse import check_layer, refuse
from .shapes import Shape
from .sharing import Sharing


class AttentionLayer:
    """Variant, scale and fixed arguments of a layer; its kernels begin to build when it is made.

    window: row q sees keys (q - window, q], without `causal` also those after q. soft_cap: None or 0 is off.
    alibi_slopes: [q_heads] numbers. sinks: [q_heads] of any float dtype, or True to reserve the buffer that
    `load_sinks` fills. tree: rows see what the per-call arguments tree_mask and tree_tokens say. own:
    FILE.py:NAME of a variant of one's own, which joins all of them, as FI_VARIANT does. sharing: of the
    planners that it will run with. More keywords are fields of jit.Spec.
    Raises NotImplementedError (refuse) or ValueError for what no executor takes, value and wish named.
    """

    def __init__(
        self,
        *,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        head_dim_vo: int | None = None,
        scale: float,
        dtype: torch.dtype,
        device: torch.device | str,
        causal: bool = True,
        window: int | None = None,
        soft_cap: float | None = None,
        alibi_slopes: Sequence[float] | torch.Tensor | None = None,
        sinks: bool | torch.Tensor | None = None,
        tree: bool = False,
        own: str = "",
        sharing: Sharing | None = None,
        **spec: Any,
    ) -> None:
        device = torch.device(device)
        self.q_heads, self.kv_heads = q_heads, kv_heads
        self.head_dim, self.head_dim_vo = head_dim, head_dim if head_dim_vo is None else head_dim_vo
        self.scale = float(scale)
        check_layer(
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            head_dim_vo=self.head_dim_vo,
            scale=self.scale,
            dtype=dtype,
            on_cpu=device.type == "cpu",
        )
        if tree and not causal:
            refuse("a tree of query tokens that is not causal is not supported")
        self.shape = Shape(q_heads, kv_heads, head_dim, self.head_dim_vo, window, causal)
        device = torch.empty(0, device=device).device  # a GPU with its index, as arguments are compared by it
        self._buffers: tuple[torch.Tensor, ...] = ()
        self._kv: KVCache | None = None
        self._args: dict[str, Any] = {}
        if window is not None:
            self._args["window"] = window
        if soft_cap:
            self._args["soft_cap"] = float(soft_cap)
        if alibi_slopes is not None:
            self._args["alibi_slopes"] = torch.as_tensor(alibi_slopes, dtype=torch.float32, device=device)
        if with_sinks := sinks is not None and sinks is not False:
            # fixed address: captured graphs hold it, and weights may be loaded again later. NaN until loaded:
            # a layer that runs without its sinks shows
            self._args["sinks"] = torch.full((q_heads,), torch.nan, device=device)
        joined, own_args = own_variant(own)
        for name, value in own_args.items():
            self._args[name] = value.to(device) if isinstance(value, torch.Tensor) else value
        fixed = variants.compose(
            causal=causal,
            window=window is not None,
            soft_cap=bool(soft_cap),
            alibi=alibi_slopes is not None,
            sinks=with_sinks,
        )
        fixed += joined
        # a value that the kernels refuse ends the start, not the first step
        fixed.pack(self._args, q_heads, device)
        if isinstance(sinks, torch.Tensor):
            self.load_sinks(sinks)
        self.variant = fixed + variants.TREE if tree else fixed
        self.dtype = dtype
        dims = head_dim, self.head_dim_vo
        self._spec = jit.Spec(jit.arch_of(device), jit.DTYPES[dtype], *dims, self.variant, **spec)
        self.build(levels=sharing is not None and sharing.may({**self.shape._asdict(), **spec}))

    def build(self, *, levels: bool) -> None:
        """Begins to build what plans run, those with levels too, unless that has begun."""
        for also in {False, levels}:
            kernels.start(replace(self._spec, levels=also))

    def packed(self, cache: torch.Tensor) -> KVCache:
        """cache [pages, kv_heads, page_size, 2 * head_dim] of this layer's head_dim."""
        if cache.dim() != 4 or cache.shape[3] != 2 * self.head_dim:
            raise ValueError(
                f"expected a packed KV cache [pages, kv_heads, page_size, {2 * self.head_dim}], "
                f"got {list(cache.shape)}"
            )
        return KVCache.packed(cache)

    def load_sinks(self, sinks: torch.Tensor) -> None:
        """Copies sinks [q_heads], of any float dtype and device, into the layer's float32 buffer."""
        if sinks.shape != (self.q_heads,):
            refuse(f"expected sinks [{self.q_heads}] (query heads), got {list(sinks.shape)}")
        if "sinks" not in self._args:
            raise ValueError("expected a layer made with sinks, got one without")
        self._args["sinks"].copy_(sinks)

    def kv(self, view: Callable[..., KVCache], *buffers: torch.Tensor) -> KVCache:
        """view(*buffers), made anew when the engine hands over other tensor objects than last time."""
        if self._kv is None or any(a is not b for a, b in zip(buffers, self._buffers, strict=True)):
            self._buffers, self._kv = buffers, view(*buffers)
        return self._kv

    def run(
        self,
        plan: Plan,
        q: torch.Tensor,
        kv: KVCache,
        out: torch.Tensor | None = None,
        **arguments: Any,
    ) -> torch.Tensor:
        """fi_backend.run of this layer. arguments: those that change per call, such as lse and tree_mask."""
        return run(plan, q, kv, out, variant=self.variant, scale=self.scale, **self._args, **arguments)


class Layers:
    """The layers of one model, each made when it is first asked for.

    describe: an engine's layer -> keywords of AttentionLayer; options: those that all layers share.
    """

    def __init__(self, describe: Callable[[Any], dict[str, Any]], **options: Any) -> None:
        self._describe, self._options = describe, options
        self._made: WeakKeyDictionary[Any, dict[tuple[bool, bool], AttentionLayer]] = WeakKeyDictionary()

    def get(self, key: Any, sinks: torch.Tensor | None = None, tree: bool = False) -> AttentionLayer:
        """key: the engine's layer. sinks: copied in every call, as weights may be loaded again."""
        made = self._made.setdefault(key, {})
        found = made.get((sinks is not None, tree))
        if found is None:
            options = {**self._describe(key), **self._options}
            found = made[sinks is not None, tree] = AttentionLayer(sinks=sinks, tree=tree, **options)
        elif sinks is not None:
            found.load_sinks(sinks)
        return found
