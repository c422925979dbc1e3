"""Which specs a model needs, read from its Hugging Face config.json."""

from __future__ import annotations

from typing import Any

from ..variants import Variant, compose
from . import Spec

_DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def specs(config: dict[str, Any], arch: int, dtype: str | None = None) -> list[Spec]:
    """The executors that decoder layers of this model run. Raises ValueError if a number is missing."""
    text = config.get("text_config") or config
    qk, vo = _head_dims(text)
    found = dtype or _DTYPES.get(
        str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or "")
    )
    if found is None or (found == "f32" and arch):
        found = "bf16"
    return [Spec(arch, found, qk, vo, variant) for variant in _variants(text)]


def _head_dims(text: dict[str, Any]) -> tuple[int, int]:
    dim = text.get("head_dim")
    if dim is None:
        hidden = text.get("hidden_size") or text.get("n_embd") or text.get("d_model")
        heads = text.get("num_attention_heads") or text.get("n_head") or text.get("n_heads")
        if not hidden or not heads:
            raise ValueError(
                "expected head_dim, or hidden_size and num_attention_heads, in config.json, found neither"
            )
        dim = hidden // heads
    return dim, dim


def _variants(text: dict[str, Any]) -> list[Variant]:
    alibi = bool(
        text.get("alibi")
        or (text.get("attn_config") or {}).get("alibi")
        or text.get("position_embedding_type") == "alibi"
        or text.get("model_type") == "bloom"
    )
    return [
        compose(
            causal=True,
            window=window,
            soft_cap=bool(text.get("attn_logit_softcapping")),
            alibi=alibi,
            sinks=text.get("model_type") == "gpt_oss",
        )
        for window in _windows(text)
    ]


def _windows(text: dict[str, Any]) -> list[bool]:
    """Whether layers with all keys, and whether layers with a window, exist."""
    if not text.get("sliding_window") or text.get("use_sliding_window") is False:
        return [False]
    layers = text.get("layer_types")
    if layers:
        return sorted({kind == "sliding_attention" for kind in layers})
    alternates = text.get("model_type", "").startswith(("gemma2", "gemma3", "cohere2", "gpt_oss"))
    return [False, True] if alternates or text.get("max_window_layers") else [True]
