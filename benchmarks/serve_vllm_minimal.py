"""The example engine's decode rate beside vLLM's, which has its own attention or ours.

`python -m benchmarks serve --engine vllm --minimal --model FOLDER --out FILE` serves a batch of prompts with
examples/minimal_engine.py and with vLLM, greedy, decode steps in CUDA graphs: all prompts in one step,
then one token of each a step. The steps' time is that of answers of N + 1 tokens without that of answers of
one. FOLDER has the weights of a Llama; without it, they are random ones of SmolLM2-135M's shape. Every figure
is in FILE at once. Compare figures only within one run.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import random
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from . import turns
from .engine_process import ROOT, tell
from .serve import CONFIG, add_process_options, parent
from .serve_vllm import engine_options

MINIMAL = "minimal engine"
SMOLLM2 = CONFIG | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
Generate = Callable[[list[list[int]], int], list[list[int]]]  # prompts, tokens of each answer -> answers


def random_model(folder: Path) -> Path:
    """A model folder with weights."""
    import torch
    from safetensors.torch import save_file

    hidden, mlp, width = (SMOLLM2[f"{name}_size"] for name in ("hidden", "intermediate", "vocab"))
    kv = SMOLLM2["num_key_value_heads"] * SMOLLM2["head_dim"]
    shapes = {"model.embed_tokens": (width, hidden), "model.norm": (hidden,)}
    for i in range(SMOLLM2["num_hidden_layers"]):
        of_layer = {
            **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,)),
            **dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (hidden, hidden)),
            **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (kv, hidden)),
            **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (mlp, hidden)),
            "mlp.down_proj": (hidden, mlp),
        }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in of_layer.items()}
    torch.manual_seed(0)
    weights = {
        f"{name}.weight": (torch.randn(shape) * 0.05 if len(shape) == 2 else torch.ones(shape)).bfloat16()
        for name, shape in shapes.items()
    }
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(SMOLLM2))
    return folder


def minimal(args: argparse.Namespace) -> Generate:
    import torch

    sys.path.insert(0, str(ROOT / "examples"))
    example = import_module("minimal_engine")
    turns.wait_for_turn(args.gate)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = example.Llama(args.model, device, torch.bfloat16)
    model.eos.clear()
    pages = args.batch * -(-(args.prompt + args.tokens + 1) // example.PAGE)
    engine = example.Engine(model, pages=pages, max_requests=args.batch, chunk=args.batch * args.prompt)

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        requests = [engine.add(prompt, tokens) for prompt in prompts]
        while engine.waiting or engine.running:
            engine.step()
        return [request.answer for request in requests]

    return generate


def vllm(args: argparse.Namespace) -> Generate:
    from vllm import LLM, SamplingParams

    turns.wait_for_turn(args.gate)
    graphs = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [args.batch]}
    llm = LLM(
        **engine_options(args.model, args.child)
        | {
            "load_format": "auto",
            "max_model_len": args.prompt + args.tokens + 1,
            "max_num_seqs": args.batch,
            "max_num_batched_tokens": args.batch * (args.prompt + 1),
            "compilation_config": {"mode": args.mode, **graphs},
        }
    )

    atexit.register(llm.llm_engine.engine_core.shutdown)  # the next engine wants the GPU's memory

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        asked: list[Any] = [{"prompt_token_ids": ids} for ids in prompts]
        return [list(o.outputs[0].token_ids) for o in llm.generate(asked, sampling, use_tqdm=False)]

    return generate


def child(args: argparse.Namespace) -> None:
    generate = (minimal if args.child == MINIMAL else vllm)(args)
    rng, vocabulary = random.Random(0), json.loads((args.model / "config.json").read_text())["vocab_size"]

    def seconds(tokens: int) -> float:
        prompts = [[rng.randrange(vocabulary) for _ in range(args.prompt)] for _ in range(args.batch)]
        start = time.perf_counter()
        answers = generate(prompts, tokens)
        taken = time.perf_counter() - start
        if found := {len(answer) for answer in answers} - {tokens}:
            raise RuntimeError(f"expected {tokens} tokens of each request, got {found}")
        return taken

    seconds(2)  # first use of kernels
    one, all = (min(seconds(tokens) for _ in range(args.repeat)) for tokens in (1, args.tokens + 1))
    step = (all - one) / args.tokens
    tell(
        case=f"{args.batch} x {args.prompt} in, {args.tokens} out",
        tokens_s=round(args.batch / step, 1),
        step_ms=round(1000 * step, 4),
        prompts_s=round(one, 4),
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks serve --engine vllm --minimal", description=__doc__
    )
    add = parser.add_argument
    add("--backends", default="FLASH_ATTN,CUSTOM", help="of vLLM, in turn (%(default)s)")
    add("--mode", type=int, default=3, help="vLLM's compilation mode: 3 as it serves, 0 none (%(default)s)")
    add("--batch", type=int, default=64, help="requests (%(default)s)")
    add("--prompt", type=int, default=256, help="tokens of a prompt (%(default)s)")
    add("--tokens", type=int, default=512, help="decode steps (%(default)s)")
    add("--repeat", type=int, default=3, help="runs, the best counts (%(default)s)")
    add_process_options(parser, "model folder with weights (random ones)")
    args = parser.parse_args(arguments)
    if args.child:
        child(args)
        return
    apart = "VLLM_ENABLE_V1_MULTIPROCESSING"  # as it serves: scheduler and model beside the rest
    environment = {apart: os.environ.get(apart, "1")}
    with parent(args, "vllm", "decode rate") as p:
        model = args.model or random_model(p.folder / "model")
        names = [MINIMAL, *filter(None, args.backends.split(","))]
        engines = [p.contender(name, model, environment=environment) for name in names]
        turns.take_turns(engines, p.end, 20)
