"""What SGLang could ask for and we do not do: refused while the engine starts, with the reason."""

from __future__ import annotations

from typing import Any

from fi_backend.serving.refuse import check_cache_dtype, check_device, refuse_if

# their image tokens see each other, by a mask that SGLang makes for its Triton backend alone
_IMAGE_MASK = {"Gemma3ForConditionalGeneration", "Gemma4ForConditionalGeneration"}


def check_runner(runner: Any) -> None:
    """What holds for the whole model."""
    check_cache_dtype(runner.kv_cache_dtype, runner.dtype)
    check_device(runner.device)
    chunk, ranks = getattr(runner, "attention_chunk_size", None), getattr(runner, "attn_cp_size", 1)
    names = set(getattr(runner.model_config.hf_config, "architectures", None) or ())
    images = runner.model_config.is_multimodal and names & _IMAGE_MASK
    refuse_if(
        {
            "latent attention (MLA) is not supported": runner.use_mla_backend,
            f"chunked local attention is not supported, got chunks of {chunk}": chunk is not None,
            f"context parallelism is not supported, got {ranks} ranks": ranks > 1,
            f"bidirectional attention inside images is not supported, got {images}": images,
        }
    )


def layer_options(layer: Any) -> dict[str, Any]:
    """A RadixAttention in AttentionLayer's words. SGLang's window does not count the query's own key."""
    encoder = layer.attn_type.value == "encoder_only"
    windowed = layer.sliding_window_size is not None and layer.sliding_window_size >= 0
    cap, position = layer.logit_capping_method, layer.pos_encoding_mode
    refuse_if(
        {
            f"expected logit_capping_method tanh, got {cap}": layer.logit_cap > 0 and cap != "tanh",
            f"expected pos_encoding_mode NONE, got {position}": position != "NONE",
            "a temperature by position (xai_temperature_len) is not supported": layer.xai_temperature_len > 0,
            "a window in bidirectional layers is not supported": encoder and windowed,
        }
    )
    return {
        "q_heads": layer.tp_q_head_num,
        "kv_heads": layer.tp_k_head_num,
        "head_dim": layer.head_dim,
        "head_dim_vo": layer.v_head_dim,
        "scale": layer.scaling,
        "causal": not layer.is_cross_attention and not encoder,
        "window": layer.sliding_window_size + 1 if windowed else None,
        "soft_cap": layer.logit_cap if layer.logit_cap > 0 else None,
    }
