"""vLLM: the engine steps in this process, or `vllm serve`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

from ..progress import Ticker
from ..serving import kernels, plans
from .report import say, show, what_ran

PLUGINS = "VLLM_PLUGINS"
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it would compile kernels of its own for a minute and more
}
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "FI_BACKEND_CPU": "1",  # puts our class into the CPU platform's only attention slot
}


def environment(gpu: bool) -> dict[str, str]:
    return ENVIRONMENT if gpu else ENVIRONMENT | CPU_ENVIRONMENT


def options(model: str, gpu: bool) -> dict[str, Any]:
    """Arguments that vLLM's EngineArgs and its command line share."""
    common = {"model": model, "max_model_len": 2048, "max_num_seqs": 16, "seed": 0}
    if gpu:
        return {**common, "attention_backend": "CUSTOM", "gpu_memory_utilization": 0.5}
    # float32 is exact, and as fast as bfloat16 on a processor without bfloat16 arithmetic
    return {**common, "dtype": "float32", "enforce_eager": True, "block_size": 32}


def answer(options: dict[str, Any], prompt: str, max_tokens: int) -> None:
    """Start the engine, stream the answer to stdout as its tokens come, then say what ran and how fast.

    Raises RuntimeError if another attention backend served the prompt.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this loop steps the engine itself
    with Ticker("launch 1/2: start vLLM, build kernels"):
        from vllm import EngineArgs, SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.llm_engine import LLMEngine

        engine = LLMEngine.from_engine_args(EngineArgs(**options))
    say("launch 2/2: answer")
    tokenizer: Any = engine.get_tokenizer()
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, output_kind=RequestOutputKind.DELTA)
    engine.add_request("0", {"prompt_token_ids": ids}, sampling)

    def pieces() -> Iterator[tuple[str, int]]:
        while engine.has_unfinished_requests():
            for output in engine.step():
                piece = output.outputs[0]
                yield piece.text, len(piece.token_ids)

    figures = show(pieces())
    say(f"{figures}; {what_ran('vLLM', plans.plans_written(), kernels.loaded())}")


def serve(options: dict[str, Any], port: int) -> None:
    """`vllm serve` in this process, on 127.0.0.1; it ends with Ctrl-C."""
    with Ticker("launch 1/2: load vLLM"):
        from vllm.entrypoints.cli.main import main as vllm  # the `vllm` command: modules below it move

    model = options["model"]
    name = os.path.basename(os.path.normpath(model))
    words = ["serve", model, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", name]
    for option, value in options.items():
        if option != "model":
            flag = "--" + option.replace("_", "-")
            words += [flag] if value is True else [flag, str(value)]
    say(f"launch 2/2: start vLLM, build kernels, then serve {name} at http://127.0.0.1:{port}/v1")
    sys.argv = ["vllm", *words]
    vllm()
