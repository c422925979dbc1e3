"""What SGLang could ask for and we do not do: refused while the engine starts, with the reason."""

from __future__ import annotations

from typing import Any

import torch

from fi_backend.serving.refuse import MIN_CAPABILITY, check_cache_dtype, refuse

# their image tokens see each other, by a mask that SGLang makes for its Triton backend alone
_IMAGE_MASK = ("Gemma3ForConditionalGeneration", "Gemma4ForConditionalGeneration")


def check_runner(runner: Any) -> None:
    """What holds for the whole model."""
    device = torch.device(runner.device)
    if device.type == "cuda" and (found := torch.cuda.get_device_capability()) < (MIN_CAPABILITY, 0):
        refuse(f"expected a GPU of compute capability {MIN_CAPABILITY}.0 or newer, got {found[0]}.{found[1]}")
    if getattr(runner, "use_mla_backend", False):
        refuse("latent attention (MLA) is not supported")
    check_cache_dtype(runner.kv_cache_dtype, runner.dtype)
    if getattr(runner, "attention_chunk_size", None) is not None:
        refuse(f"chunked local attention is not supported, got chunks of {runner.attention_chunk_size}")
    if (ranks := getattr(runner, "attn_cp_size", 1)) > 1:
        refuse(f"context parallelism is not supported, got {ranks} ranks")
    model = runner.model_config
    for name in getattr(model.hf_config, "architectures", None) or ():
        if name in _IMAGE_MASK and model.is_multimodal:
            refuse(f"bidirectional attention inside images ({name}) is not supported")


def check_layer(layer: Any) -> None:
    if layer.logit_cap > 0 and layer.logit_capping_method != "tanh":
        refuse(f"expected logit_capping_method tanh, got {layer.logit_capping_method}")
    if layer.pos_encoding_mode != "NONE":
        refuse(f"expected pos_encoding_mode NONE, got {layer.pos_encoding_mode}")
    if layer.xai_temperature_len > 0:
        refuse(
            f"temperature by position is not supported, got xai_temperature_len={layer.xai_temperature_len}"
        )
    windowed = layer.sliding_window_size is not None and layer.sliding_window_size >= 0
    if windowed and layer.attn_type.value == "encoder_only":
        refuse("a sliding window in bidirectional layers is not supported")
