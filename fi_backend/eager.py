"""The oracle: attention in float64, one request at a time, gathering its own keys from the page table.

Imports nothing of ours but the formats and the eager form of the variants. With another `dtype` it is torch
eager in that precision, which says how much error is fair.
"""

from __future__ import annotations

from typing import Any

import torch

from .formats import BlockSparse, KVCache
from .variants import Variant


def pages_of(batch: BlockSparse, request: int) -> list[int]:
    kv_len = int(batch.kv_len[request])
    start = (request if batch.starts is None else int(batch.starts[request])) * batch.start_stride
    flat = torch.as_strided(batch.table, (batch.table_size,), (1,))
    count = -(-kv_len // batch.page_size)
    entries = [int(flat[start + p * batch.entry_step]) for p in range(count)]
    return [e // batch.page_size for e in entries] if batch.entries_are_slots else entries


def gather(cache: torch.Tensor, pages: list[int], kv_len: int) -> torch.Tensor:
    """[kv_len, kv_heads, head_dim] of one side of the cache."""
    return cache[torch.tensor(pages, dtype=torch.int64, device=cache.device)].flatten(0, 1)[:kv_len]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    variant: Variant,
    args: dict[str, Any],
    scale: float,
    dtype: torch.dtype,
    request: int = 0,
    q_first: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [Tq, Hq, D], k [Tk, Hk, D], v [Tk, Hk, Dv] -> out [Tq, Hq, Dv], lse [Tq, Hq].

    One request; request is its index in the batch, q_first that of its first query token. Without softmax
    there is no lse: NaN.
    """
    wide = torch.promote_types(
        dtype, torch.float32
    )  # logits and softmax of 16-bit eager attention are float32
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.to(dtype).transpose(0, 1) for x in (q, k, v))
    q_pos = torch.arange(q.shape[1], device=q.device) + k.shape[1] - q.shape[1]
    kv_pos = torch.arange(k.shape[1], device=q.device)
    args = args | {"request": request, "q_len": q.shape[1], "kv_len": k.shape[1], "q_first": q_first}
    for feature in variant.features:
        if feature.query is not None:
            q = feature.query(q.to(wide), q_pos, **args)
        if feature.key is not None:
            k = feature.key(k.to(wide), kv_pos, **args)
        if feature.value is not None:
            v = feature.value(v.to(wide), kv_pos, **args)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    x = (q @ k.transpose(1, 2)).to(wide) * scale
    visible = torch.ones(len(q_pos), len(kv_pos), dtype=torch.bool, device=q.device)
    sinks = torch.full((q.shape[0],), -torch.inf, dtype=wide, device=q.device)
    weights = None

    def finished(p: torch.Tensor) -> torch.Tensor:
        out = p.to(dtype) @ v
        for feature in variant.features:
            if feature.output is not None:
                out = feature.output(out.to(wide), q_pos, **args).to(dtype)
        return out.transpose(0, 1)

    for feature in variant.features:
        if feature.mask is not None:
            visible &= feature.mask(q_pos, kv_pos, **args)
        if feature.logits is not None:
            x = feature.logits(x, q_pos, kv_pos, **args)
        if feature.sink is not None:
            sinks = feature.sink(**args).to(wide)
        if feature.weights is not None:
            weights = feature.weights
    if weights is not None:
        p = weights(x, q_pos, kv_pos, **args).masked_fill(~visible, 0)
        return finished(p), x.new_full((len(q_pos), len(x)), torch.nan)
    x = x.masked_fill(~visible, -torch.inf)
    x = torch.cat([x, sinks[:, None, None].expand(-1, x.shape[1], 1)], 2)
    lse = x.logsumexp(2)
    p = torch.exp(x - lse.masked_fill(lse == -torch.inf, 0)[..., None])[..., :-1]
    return finished(p), lse.transpose(0, 1)


def attention(
    q: torch.Tensor,
    kv: KVCache,
    batch: BlockSparse,
    variant: Variant,
    args: dict[str, Any],
    scale: float,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [tokens, q_heads, head_dim_vo] and lse [tokens, q_heads] of the requests' tokens, in float64."""
    offsets = batch.qo_indptr.tolist()
    out = torch.zeros(offsets[-1], q.shape[1], kv.head_dim_vo, dtype=torch.float64, device=q.device)
    lse = torch.full((offsets[-1], q.shape[1]), -torch.inf, dtype=torch.float64, device=q.device)
    for request in range(batch.num_requests):
        rows, pages, kv_len = (
            slice(*offsets[request : request + 2]),
            pages_of(batch, request),
            int(batch.kv_len[request]),
        )
        k, v = gather(kv.k, pages, kv_len), gather(kv.v, pages, kv_len)
        o, s = attend(q[rows], k, v, variant, args, scale, dtype, request, offsets[request])
        out[rows], lse[rows] = o.double(), s.double()
    return out, lse
