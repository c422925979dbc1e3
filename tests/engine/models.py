"""Tiny model folders with random weights, for tests against a real engine.

The weights matter: with constant or dummy weights a backend that ignores a window still answers correctly.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VOCAB = 512
WINDOW = 32
SOFT_CAP = 2.0  # small, so that it bends the logits these weights make


@dataclass(frozen=True)
class Model:
    """hidden = q_heads * head_dim. `extra` goes into config.json as it is."""

    name: str
    architecture: str
    model_type: str
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    layers: int = 2
    extra: dict[str, Any] = field(default_factory=dict)
    weights_of: str = ""  # another model

    @property
    def hidden(self) -> int:
        return self.q_heads * self.head_dim

    @property
    def gemma(self) -> bool:
        return self.model_type.startswith("gemma")

    def config(self) -> dict[str, Any]:
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.q_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": VOCAB,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": self.gemma,
            "torch_dtype": "float32",
            "bos_token_id": 1,
            "eos_token_id": 2,
            **self.extra,
        }

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(sum(map(ord, self.weights_of or self.name)))

        def matrix(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, generator=generator) * (2 / columns**0.5)

        def norm(size: int = self.hidden) -> torch.Tensor:
            # Gemma's norms store the difference from one
            return torch.zeros(size) if self.gemma else torch.ones(size)

        # Gemma scales its embeddings up and reads its logits with them: large ones would echo the last token
        scale = 0.01 if self.gemma else 1.0
        yield "model.embed_tokens.weight", scale * torch.randn(VOCAB, self.hidden, generator=generator)
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if self.gemma else []
        wide = 2 * self.hidden
        for i in range(self.layers):
            prefix = f"model.layers.{i}"
            for name in norms:
                yield f"{prefix}.{name}.weight", norm()
            for name, heads in (("q", self.q_heads), ("k", self.kv_heads), ("v", self.kv_heads)):
                yield f"{prefix}.self_attn.{name}_proj.weight", matrix(heads * self.head_dim, self.hidden)
            yield f"{prefix}.self_attn.o_proj.weight", matrix(self.hidden, self.hidden)
            if self.model_type == "gemma3_text":
                yield f"{prefix}.self_attn.q_norm.weight", norm(self.head_dim)
                yield f"{prefix}.self_attn.k_norm.weight", norm(self.head_dim)
            yield f"{prefix}.mlp.gate_proj.weight", matrix(wide, self.hidden)
            yield f"{prefix}.mlp.up_proj.weight", matrix(wide, self.hidden)
            yield f"{prefix}.mlp.down_proj.weight", matrix(self.hidden, wide)
        yield "model.norm.weight", norm()
        if not self.gemma:
            yield "lm_head.weight", matrix(VOCAB, self.hidden)


WINDOWED, FULL = "sliding_attention", "full_attention"
TANH = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
GEMMA = {"query_pre_attn_scalar": 64, "sliding_window": WINDOW, **TANH}
GEMMA2 = {**GEMMA, "attn_logit_softcapping": SOFT_CAP, "final_logit_softcapping": 30.0}
MODELS = {
    m.name: m
    for m in (
        Model("llama", "LlamaForCausalLM", "llama"),
        Model("mistral", "MistralForCausalLM", "mistral", extra={"sliding_window": WINDOW}),
        Model("wide", "MistralForCausalLM", "mistral", extra={"sliding_window": None}, weights_of="mistral"),
        Model(
            "gemma2",
            "Gemma2ForCausalLM",
            "gemma2",
            # three cache groups, two of them with equal plans
            extra={**GEMMA2, "layer_types": [WINDOWED, WINDOWED, FULL]},
            layers=3,
        ),
        Model(
            "gemma2-even",  # SGLang gives every second layer the window, whatever layer_types say
            "Gemma2ForCausalLM",
            "gemma2",
            # and caps final logits by a Triton kernel that the interpreter cannot run
            extra={**GEMMA2, "layer_types": [WINDOWED, FULL], "final_logit_softcapping": None},
        ),
        Model(
            "gemma3",
            "Gemma3ForCausalLM",
            "gemma3_text",
            extra={**GEMMA, "layer_types": [WINDOWED, FULL], "rope_local_base_freq": 10000.0},
        ),
    )
}


def write(name: str, root: Path) -> Path:
    """Model folder root/name with weights and configuration. No tokenizer: prompts are token ids."""
    from safetensors.torch import save_file

    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    model = MODELS[name]
    save_file(dict(model.weights()), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    (folder / "config.json").write_text(json.dumps(model.config(), indent=1))
    return folder


def prompt(length: int, seed: int) -> list[int]:
    """Token ids, without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=list(MODELS))
    args = parser.parse_args()
    for name in args.names:
        print(write(name, args.folder))


if __name__ == "__main__":
    main()
