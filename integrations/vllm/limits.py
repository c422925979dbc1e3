"""What vLLM in particular could ask for and we do not do: refused at its start, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fi_backend.serving.refuse import check_cache_dtype, check_unknown, refuse, refuse_if

KV_CACHE_DTYPES = ("auto", "float16", "bfloat16")
# Exact names: a subclass of these specs (sink, reference window, quantised, ...) is another kind of cache.
_CACHE_SPECS = ("FullAttentionSpec", "SlidingWindowSpec")


def check_layer(kv_cache_dtype: str | None, attn_type: str, extra: Mapping[str, Any]) -> None:
    """Constructor arguments of one layer. `extra` holds those that this adapter does not know."""
    if kv_cache_dtype is not None and kv_cache_dtype not in KV_CACHE_DTYPES:
        refuse(f"expected kv_cache_dtype {', '.join(KV_CACHE_DTYPES)}, got {kv_cache_dtype}")
    if attn_type != "decoder":
        refuse(f"expected decoder attention, got {attn_type}")
    check_unknown(extra)


def check_engine(config: Any, spec: Any, layers: list[Any], *, batch_invariant: bool = False) -> None:
    """What holds for a whole group of layers; `layers` are the group's attention modules that are known."""
    kind = type(spec).__name__
    if kind not in _CACHE_SPECS:
        refuse(f"expected a KV cache of {' or '.join(_CACHE_SPECS)}, got {kind}")
    value_dim = getattr(spec, "head_size_v", None) or spec.head_size
    if value_dim != spec.head_size:
        refuse(f"expected V heads as wide as K heads ({spec.head_size}), got {value_dim}")
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    check_cache_dtype(spec.dtype, model.dtype)
    prefix_lm = getattr(model, "is_mm_prefix_lm", False)
    reference_window = getattr(model, "rswa_window", None) is not None
    reasons = {
        "bidirectional decoder layers are not supported": getattr(spec, "non_causal", False),
        "chunked local attention is not supported": getattr(spec, "attention_chunk_size", None),
        "bidirectional attention inside images (prefix LM) is not supported": prefix_lm,
        "reference sliding window attention is not supported": reference_window,
        # the CPU platform does not ask the backend
        "VLLM_BATCH_INVARIANT=1 is not supported": batch_invariant,
        "kv_sharing_fast_prefill is not supported": getattr(cache, "kv_sharing_fast_prefill", False),
    }
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, name, 1)
        reasons[f"context parallelism is not supported, got {name}={size}"] = size > 1
    refuse_if(reasons)
    if len(heads := {layer.num_heads for layer in layers}) > 1:
        refuse(f"expected layers of one cache group to have equally many query heads, got {sorted(heads)}")


def check_mask(causal: Any) -> None:
    """The mask of one step."""
    if isinstance(causal, torch.Tensor):
        refuse("a per-request mix of causal and bidirectional attention is not supported")
    if not (isinstance(causal, (bool, np.bool_)) and causal):
        refuse(f"expected causal decoder attention, got causal={causal}")
