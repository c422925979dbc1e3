"""A decode step of a whole model of Vicuna-13B's shape, whose caches are windows that slide (StreamingLLM).

The page table of a request names the page of its sinks and those of its window, in order; positions are those
within it, so keys are cached before rotation and turn to another angle when a page leaves. All layers share a
cache: a layer's weights, 634 MB, push it out of the L2 before the next one reads it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from fi_backend import KVCache, append

from .data import Data
from .implementations import Prepare

LAYERS, VOCABULARY = 40, 32000


@functools.cache
def _weights(hidden: int, qkv: int, device: torch.device) -> tuple[list[list[torch.Tensor]], torch.Tensor]:
    """Those of each layer, and embeddings, which are the head's too. Activations keep their size."""
    mlp = hidden * 27 // 10

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device) * shape[0] ** -0.5

    shapes = ((hidden, qkv), (hidden, hidden), (hidden, 2 * mlp), (mlp, hidden))
    return [[normal(*shape) for shape in shapes] for _ in range(LAYERS)], normal(VOCABULARY, hidden)


def decode_step(data: Data, prepare: Prepare) -> Callable[[], torch.Tensor]:
    """One token more for each request. Returns the last layer's attention [tokens, q_heads, D].

    Overwrites data.q by views of the layers' queries, and the last key and value of each request.
    """
    case, device = data.case, data.q.device
    hidden, heads = case.q_heads * case.head_dim, case.q_heads + 2 * case.kv_heads
    layers, embedding = _weights(hidden, heads * case.head_dim, device)
    qkv = data.q.new_empty(case.tokens, heads, case.head_dim)
    data.q, k, v = qkv.split([case.q_heads, case.kv_heads, case.kv_heads], 1)
    attention, cache = prepare(data), KVCache.separate(data.k, data.v, "NHD")
    last = data.kv_len.long() - 1
    page = data.block_table.gather(1, last[:, None] // case.page_size)[:, 0]
    slots = page * case.page_size + last % case.page_size
    tokens = torch.zeros(case.tokens, dtype=torch.int64, device=device)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (hidden,), eps=1e-5)

    def step() -> torch.Tensor:
        attention.plan()
        x = embedding[tokens]
        for into_qkv, into_out, gate_up, down in layers:
            torch.mm(norm(x), into_qkv, out=qkv.flatten(1))
            append(cache, k, v, slots)
            x = torch.addmm(x, attention.run().flatten(1), into_out)
            gate, up = (norm(x) @ gate_up).chunk(2, -1)
            x = torch.addmm(x, F.silu(gate) * up, down)
        tokens.copy_((norm(x) @ embedding.T).argmax(-1))
        return data.out

    return step
