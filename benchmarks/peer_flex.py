"""torch's FlexAttention, compiled for the shape, on contiguous tensors instead of pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .cases import WINDOW
from .data import Data
from .implementations import Prepare, Prepared, Unsupported
from .variants import SOFT_CAP, slopes

Mod = Callable[..., torch.Tensor]


def _causal(b: Any, h: Any, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    return q >= kv


def _window(b: Any, h: Any, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    return (q >= kv) & (q - kv < WINDOW)


def _soft_cap(x: torch.Tensor, b: Any, h: Any, q: Any, kv: Any) -> torch.Tensor:
    return SOFT_CAP * torch.tanh(x / SOFT_CAP)


def _alibi(data: Data) -> Mod:
    of_head = slopes(data.case, data.q.device)

    def alibi(x: torch.Tensor, b: Any, h: Any, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return x + of_head[h] * (kv - q)

    return alibi


def _flex(data: Data) -> Prepared:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case = data.case
    if len({*case.q_lens, *case.kv_lens}) > 1:
        raise Unsupported("lengths differ")
    masks = {"CAUSAL": _causal, "CAUSAL+WINDOW": _window, "CAUSAL+SOFT_CAP": _causal, "CAUSAL+ALIBI": _causal}
    if case.variant not in masks:
        raise Unsupported(f"no {case.variant}")
    mods = {"CAUSAL+SOFT_CAP": _soft_cap, "CAUSAL+ALIBI": _alibi(data)}
    requests, n = len(case.q_lens), case.q_lens[0]

    def dense(cache: torch.Tensor) -> torch.Tensor:  # [R, heads, n, D]
        return cache[data.block_table.long()].flatten(1, 2)[:, :n].transpose(1, 2).contiguous()

    q = data.q.view(requests, n, case.q_heads, case.head_dim).transpose(1, 2).contiguous()
    k, v = dense(data.k), dense(data.v)
    torch._dynamo.reset()  # a function is compiled for a few shapes only, then no more
    compiled = torch.compile(flex_attention, dynamic=False)

    def plan() -> Any:
        return create_block_mask(masks[case.variant], None, None, n, n, device=str(q.device))

    block_mask = plan()

    def run() -> torch.Tensor:
        out = compiled(
            q,
            k,
            v,
            score_mod=mods.get(case.variant),
            block_mask=block_mask,
            scale=case.head_dim**-0.5,
            enable_gqa=case.q_heads != case.kv_heads,
        )
        return out.transpose(1, 2)

    return Prepared(plan, run)


PEERS: dict[str, Prepare] = {"flex": _flex}
