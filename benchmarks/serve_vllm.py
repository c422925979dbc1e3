"""Whole-engine figures: Llama-3.1-8B shape with dummy weights in vLLM, ours and FLASH_ATTN.

`python -m benchmarks serve --engine vllm --out FILE` starts all engines at once; when they have imported vLLM
they start up and serve in turns: the peer, ours with an empty kernel cache, the peer again (warm machine),
ours again (kernels cached). Every figure is in FILE at once; what no longer fits into --minutes is left out
and said so. Compare figures only within one run.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from . import turns
from .engine_process import tell
from .serve import CONTEXT, MAX_REQUESTS, Requests, add_options, make_model, parent, time_cases
from .serve import prompts as token_ids


def buffers(worker: Any) -> list[dict[str, int]]:
    """Runs in the worker: bytes of our planners, which may share a workspace; empty for another backend."""
    from fi_backend.serving.plans import planners

    return [
        {"plan_bytes": p.planner.plan_bytes, "workspace_bytes": p.planner.workspace_bytes} for p in planners()
    ]


def engine_options(model: Path, backend: str) -> dict[str, Any]:
    return {
        "model": str(model),
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": "bfloat16",
        "seed": 0,
        "max_model_len": CONTEXT,
        "max_num_seqs": MAX_REQUESTS,
        "gpu_memory_utilization": 0.9,
        "enable_prefix_caching": False,
        "attention_backend": backend,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    }


def child(args: argparse.Namespace) -> None:
    """One engine: start-up, then the cases."""
    from vllm import LLM, SamplingParams

    turns.wait_for_turn(args.gate)
    begin = time.monotonic()
    llm = LLM(**engine_options(args.model, args.child))
    tell(case=f"start-up, {args.condition}", seconds=round(time.monotonic() - begin, 2))
    for sizes in llm.collective_rpc(buffers)[0]:
        tell(case="buffers", **sizes)

    def generate(requests: Requests, seed: int) -> float:
        prompts: list[Any] = [{"prompt_token_ids": ids} for ids in token_ids(requests, seed)]
        sampling = [
            SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
            for _, n in requests
        ]
        start = time.monotonic()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.monotonic() - start
        for output, (_, n) in zip(outputs, requests, strict=True):
            if len(output.outputs[0].token_ids) != n:
                raise RuntimeError(f"expected {n} tokens, got {len(output.outputs[0].token_ids)}")
        return seconds

    if args.condition == "warm":
        tell(case="first answer", seconds=round(generate([(64, 4)], 1), 3))
        return
    generate([(300, 8)] * 32, 1)  # first use of the sampler's and the runner's own kernels
    time_cases(generate, args.case, args.repeat, turns.deadline(args.gate))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks serve --engine vllm", description=__doc__)
    parser.add_argument("--peer", default="FLASH_ATTN", help="backend to compare with (default: %(default)s)")
    parser.add_argument("--skip-warm", action="store_true", help="leave out the second start of each backend")
    add_options(parser)
    parser.add_argument("--condition", help=argparse.SUPPRESS)  # what is cached at its start
    args = parser.parse_args(arguments)
    if args.child:
        child(args)
        return
    stages = [(args.peer, "first"), ("CUSTOM", "cold")]
    stages += [] if args.skip_warm else [(args.peer, "warm"), ("CUSTOM", "warm")]
    with parent(args, "vllm") as p:
        model = make_model(p.folder / "model")
        kernels = {"FI_CACHE_DIR": str(p.folder / "kernels")}
        engines = [
            p.contender(name, model, "--condition", condition, run=f"{condition} run", environment=kernels)
            for name, condition in stages
        ]
        # the first serves all cases, on a cold machine
        turns.take_turns(engines, p.end, 40, lambda left, n: left * 0.6 if n == len(engines) else left)
