"""What SGLang could ask for and we do not do: refused while the engine starts, with the reason."""

from __future__ import annotations

from typing import Any

import torch

from fi_backend.serving.refuse import MIN_CAPABILITY, check_cache_dtype, refuse_if

# their image tokens see each other, by a mask that SGLang makes for its Triton backend alone
_IMAGE_MASK = {"Gemma3ForConditionalGeneration", "Gemma4ForConditionalGeneration"}


def check_runner(runner: Any) -> None:
    """What holds for the whole model."""
    check_cache_dtype(runner.kv_cache_dtype, runner.dtype)
    on_gpu = torch.device(runner.device).type == "cuda"
    capability = torch.cuda.get_device_capability() if on_gpu else (MIN_CAPABILITY, 0)
    chunk, ranks = getattr(runner, "attention_chunk_size", None), getattr(runner, "attn_cp_size", 1)
    names = set(getattr(runner.model_config.hf_config, "architectures", None) or ())
    refuse_if(
        {
            f"expected a GPU of compute capability {MIN_CAPABILITY}.0 or newer, got {capability}": (
                capability[0] < MIN_CAPABILITY
            ),
            "latent attention (MLA) is not supported": runner.use_mla_backend,
            f"chunked local attention is not supported, got chunks of {chunk}": chunk is not None,
            f"context parallelism is not supported, got {ranks} ranks": ranks > 1,
            f"bidirectional attention inside images is not supported ({', '.join(names)})": (
                runner.model_config.is_multimodal and names & _IMAGE_MASK
            ),
        }
    )


def check_layer(layer: Any) -> None:
    position = layer.pos_encoding_mode
    cap, encoder = layer.logit_capping_method, layer.attn_type.value == "encoder_only"
    refuse_if(
        {
            f"expected logit_capping_method tanh, got {cap}": layer.logit_cap > 0 and cap != "tanh",
            f"expected pos_encoding_mode NONE, got {position}": position != "NONE",
            "a temperature by position (xai_temperature_len) is not supported": layer.xai_temperature_len > 0,
            "a window in bidirectional layers is not supported": encoder and layer.sliding_window_size >= 0,
        }
    )
