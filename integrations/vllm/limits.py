"""Everything vLLM could ask for and we do not do: refused while the engine starts, with the reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

KV_CACHE_DTYPES = ("auto", "float16", "bfloat16")
MIN_CAPABILITY = 8
# Exact names: a subclass of these specs (sink, reference window, quantised, ...) is another kind of cache.
_CACHE_SPECS = ("FullAttentionSpec", "SlidingWindowSpec")


def refuse(reason: str) -> None:
    raise NotImplementedError(f"fi_backend: {reason}; use another attention backend")


def head_size_step(on_cpu: bool) -> int:
    return 8 if on_cpu else 16


def check_layer(
    *,
    head_size: int,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    kv_cache_dtype: str | None,
    attn_type: str,
    on_cpu: bool,
    extra: Mapping[str, Any],
) -> None:
    """Constructor arguments of one layer. `extra` holds those that this adapter does not know."""
    step = head_size_step(on_cpu)
    if not 0 < head_size <= 256 or head_size % step:
        refuse(f"expected head_size a multiple of {step} up to 256, got {head_size}")
    if num_heads % num_kv_heads:
        refuse(f"expected query heads a multiple of the {num_kv_heads} KV heads, got {num_heads}")
    if not 0 < scale < math.inf:
        refuse(f"expected a scale above 0, got {scale}")
    if kv_cache_dtype is not None and kv_cache_dtype not in KV_CACHE_DTYPES:
        refuse(f"expected kv_cache_dtype {', '.join(KV_CACHE_DTYPES)}, got {kv_cache_dtype}")
    if attn_type != "decoder":
        refuse(f"expected decoder attention, got {attn_type}")
    for name, value in extra.items():
        if not _unset(value):
            refuse(f"layer argument {name}={value!r} is not supported")


def _unset(value: Any) -> bool:
    """-1 is how vLLM says "off" of a number; 0 is a number."""
    return value is None or value is False or (isinstance(value, int) and value == -1)


def check_engine(config: Any, spec: Any, layers: list[Any], *, batch_invariant: bool = False) -> None:
    """What holds for a whole group of layers; `layers` are the group's attention modules that are known."""
    kind = type(spec).__name__
    if kind not in _CACHE_SPECS:
        refuse(f"expected a KV cache of {' or '.join(_CACHE_SPECS)}, got {kind}")
    value_dim = getattr(spec, "head_size_v", None) or spec.head_size
    if value_dim != spec.head_size:
        refuse(f"expected V heads as wide as K heads ({spec.head_size}), got {value_dim}")
    if getattr(spec, "non_causal", False):
        refuse("bidirectional decoder layers are not supported")
    if getattr(spec, "attention_chunk_size", None):
        refuse("chunked local attention is not supported")
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    if spec.dtype != model.dtype:
        refuse(f"expected a KV cache of the model's dtype {model.dtype}, got {spec.dtype}")
    if getattr(model, "is_mm_prefix_lm", False):
        refuse("bidirectional attention inside images (prefix LM) is not supported")
    if getattr(model, "rswa_window", None) is not None:
        refuse("reference sliding window attention is not supported")
    if batch_invariant:  # the CPU platform does not ask the backend
        refuse("VLLM_BATCH_INVARIANT=1 is not supported")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, name, 1)) > 1:
            refuse(f"context parallelism is not supported, got {name}={size}")
    if getattr(cache, "kv_sharing_fast_prefill", False):
        refuse("kv_sharing_fast_prefill is not supported")
    if len(heads := {layer.num_heads for layer in layers}) > 1:
        refuse(f"expected layers of one cache group to have equally many query heads, got {sorted(heads)}")
